"""What is measured: evaluation, entropy, FLOPs, peak, drawings, and the log they come from."""

import io
import json
import math
import re

import pytest
import torch
from rich.console import Console
from torch import nn

from fat5.errors import DataError
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.tasks import Pretraining
from fat5.tasks.sizes import settle
from fat5.train import Scorer, World, evaluate, read_rows, unigram_entropy
from fat5.train.cost.flops import peak_flops, training_flops
from fat5.train.log.display import CountDisplay, RunDisplay
from fat5.train.log.metrics import MetricsLog
from fat5.train.log.plots import LivePlot, draw_comparison, draw_evaluations, draw_run, new_figure, smooth
from fat5.train.precision import Precision
from made_run import tiny


@pytest.fixture(scope="module")
def scored(prepared, tmp_path_factory):
    config = tiny(prepared, tmp_path_factory.mktemp("none"))
    alone = World(torch.device("cpu"))
    data = Pretraining.open(settle(config, alone), alone)
    torch.manual_seed(0)
    return data.build_model(), data


def test_evaluation_is_the_mean_over_each_denoisers_tokens(scored):
    """Against the padded forward pass, document by document."""
    model, data = scored
    model.train()
    cpu = torch.device("cpu")
    scorer = Scorer(model, Precision("fp32", cpu), World(cpu), model)
    result = evaluate(scorer, ((batch, batch.denoiser) for batch in data.validation), data.names, "part")
    assert model.training, "switched back"
    sums = {name: [0.0, 0, 0] for name in data.names}
    model.eval()
    for batch in data.validation:
        for index in range(batch.num_examples):
            inputs = batch.input_ids[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]]
            labels = batch.labels[batch.decoder_cu_seqlens[index] : batch.decoder_cu_seqlens[index + 1]]
            with torch.no_grad():
                logits = model(input_ids=inputs[None], labels=labels[None]).logits[0]
            total = sums[data.names[batch.denoiser[index]]]
            total[0] += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            total[1] += (logits.argmax(-1) == labels).sum().item()
            total[2] += len(labels)
    model.train()
    assert set(result["by_part"]) == set(data.names)
    for name, (loss, correct, tokens) in sums.items():
        score = result["by_part"][name]
        assert score["tokens"] == tokens
        assert score["loss"] == pytest.approx(loss / tokens, rel=1e-5)
        assert score["accuracy"] == pytest.approx(correct / tokens, abs=1e-9)
    overall = [sum(column) for column in zip(*sums.values(), strict=True)]
    assert result["loss"] == pytest.approx(overall[0] / overall[2], rel=1e-5)


def test_unigram_entropy_of_known_frequencies(scored):
    _, data = scored
    batch = data.validation[0]
    labels = torch.full_like(batch.labels, -100)
    labels[:4] = torch.tensor([7, 7, 8, 9])
    from dataclasses import replace

    expected = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert unigram_entropy([replace(batch, labels=labels)]) == pytest.approx(expected)


def test_flops_agree_with_torchs_count_of_the_matrices():
    """torch counts the same matrix products, but for attention, a custom op that it does not see into.

    Its hooks on every module make the model call its output projection, which is counted so.
    """
    from torch.utils.flop_counter import FlopCounterMode

    config = FAT5Config.preset("fat5-demo", vocab_size=1024)
    model = FAT5ForConditionalGeneration(config)
    encoder, decoder = torch.tensor([100, 156]), torch.tensor([60, 68])
    lengths = {"cu_seqlens": encoder, "decoder_cu_seqlens": decoder}
    packed = {key: nn.functional.pad(value.cumsum(0), (1, 0)).int() for key, value in lengths.items()}
    inputs = {"input_ids": torch.randint(1, 1024, (256,)), "labels": torch.randint(1, 1024, (128,))}
    counter = FlopCounterMode(display=False)
    with counter:
        model(**inputs, **packed, max_seqlen=256, decoder_max_seqlen=128).loss.backward()
    flops = training_flops(config, encoder, decoder)
    assert flops - attention_of(config, encoder, decoder) == counter.get_total_flops()


def attention_of(config, encoder, decoder):
    encoder, decoder = encoder.double(), decoder.double()
    scores = config.num_layers * (encoder**2).sum()
    scores += config.num_decoder_layers * ((decoder**2).sum() / 2 + (encoder * decoder).sum())
    return float(12 * config.num_heads * config.d_kv * scores)


def test_peak_of_this_cpu_is_plausible():
    assert 1e9 < peak_flops(torch.device("cpu"), "fp32") < 1e14


def rows(steps):
    yield {"kind": "eval", "step": 0, "loss": 7.0, "accuracy": 0.0, "by_denoiser": {"[S]": {"loss": 7.0}}}
    for step in range(1, steps + 1):
        loss = None if step == 3 else 7 - step / 10
        numbers = {
            "lr": 0.01,
            "grad_norm": loss,
            "tokens": 100 * step,
            "tokens_per_second": 50.0,
            "seconds": 2.0 * step,
        }
        yield {"kind": "train", "step": step, "loss": loss, **numbers}
    yield {"kind": "eval", "step": steps, "loss": 6.0, "accuracy": 0.1, "by_denoiser": {"[S]": {"loss": 6.0}}}


def written(folder, steps=10):
    folder.mkdir()
    log = MetricsLog(folder / "metrics.jsonl")
    for row in rows(steps):
        log.write(row)
    return log


def test_log_is_cut_by_step_and_of_its_torn_line(tmp_path):
    log = written(tmp_path / "run")
    torn = b'{"kind": "train", "step": 11, "lo'
    with open(log.path, "ab") as file:
        file.write(torn)
    assert len(read_rows(log.path)) == 12, "a row being written is not read"
    kept = tmp_path / "discarded.jsonl"
    assert log.rewind(10, kept) == [], "what a crash leaves is no damage"
    assert kept.read_bytes() == torn + b"\n"
    log.rewind(4, kept)
    assert [row["step"] for row in read_rows(log.path)] == [0, 1, 2, 3, 4]
    discarded = [json.loads(line)["step"] for line in kept.read_text().splitlines()[1:]]
    assert discarded == [5, 6, 7, 8, 9, 10, 10]
    log.rewind(-1, kept)
    assert log.path.read_bytes() == b""


def test_drawings(tmp_path):
    written(tmp_path / "a"), written(tmp_path / "b", steps=5)
    draw_run(tmp_path / "a" / "metrics.jsonl", tmp_path / "loss.png", "title", ("unigram entropy", 5.0))
    for axis in ("step", "tokens", "hours"):
        draw_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / f"{axis}.png", axis)
    for name in ("loss", "step", "tokens", "hours"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(DataError, match="the same run is given twice"):
        draw_comparison([tmp_path / "a", tmp_path / "a"], tmp_path / "x.png")


def test_smoothing_is_unbiased_and_passes_over_gaps():
    assert smooth([4.0] * 100, 5) == pytest.approx([4.0] * 100)
    values = smooth([1.0, math.nan, 1.0], 2)
    assert values == pytest.approx([1.0, 1.0, 1.0])
    assert abs(smooth([math.sin(i) for i in range(1000)], 20)[-1]) < 0.2


def test_live_plot_is_seldom_and_survives_a_full_disk(monkeypatch):
    from fat5.train.log import plots

    drawn = []

    def draw():
        drawn.append(1)
        raise OSError("no space")

    monkeypatch.setattr(plots, "LEAST_SECONDS", 0.0)
    plot = LivePlot(draw)
    plot.poke()
    plot.finish()
    assert len(drawn) == 2
    monkeypatch.setattr(plots, "LEAST_SECONDS", 100.0)
    patient = LivePlot(draw)
    for _ in range(5):
        patient.poke()
    assert len(drawn) == 2


@pytest.mark.parametrize("columns", [80, 200])
def test_the_bar_takes_the_width_and_shows_every_number(monkeypatch, columns):
    monkeypatch.setattr("fat5.train.log.display.os.isatty", lambda descriptor: True)
    display = RunDisplay("pretrain", 50_000, every=10, eval_every=500, mfu=True, compiled=True)
    display.begin(500, {"loss": 6.5432})
    row = {"kind": "train", "step": 12_345, "loss": 6.1234, "lr": 0.0123, "step_tokens": 800_000, "mfu": 0.4}
    display.show(row | {"tokens_per_second": 1_234_567.0})
    seen = Console(width=columns, record=True, file=io.StringIO())
    seen.print(display._bar)
    bar, numbers = seen.export_text().rstrip().splitlines()
    assert len(bar.rstrip()) > columns - 3
    assert bar.count("━") > (columns - 48) * row["step"] / 50_000, "without colours the rest of the bar is blank"
    assert re.search(r"12345/50000 .* 6:\d\d:\d\d left", bar)
    assert numbers.rstrip() == "loss 6.1234  validation 6.5432  lr 0.0123  1,234,567 tokens/s  MFU 40%"


def task_row(step, **scores):
    return {"kind": "eval", "step": step, "loss": 3.0, "tokens": 9, "by_source": {"a.jsonl": {"loss": 3.0}}} | scores


@pytest.mark.parametrize(
    ("evals", "title", "curves"),
    [
        ([task_row(0, accuracy=0.5, macro_f1=0.25)], "validation scores", {"accuracy": 0.5, "macro_f1": 0.25}),
        ([task_row(0, accuracy=0.5)], "validation accuracy", {"accuracy": 0.5}),
        ([task_row(0, accuracy=None, pearson=0.1, mean_squared_error=9.0)], "validation pearson", {"pearson": 0.1}),
        (
            [task_row(0, accuracy=0.5) | {"by_source": {"a": {"loss": 1.0}, "b": {"loss": 2.0}}}],
            "validation loss by source",
            {"a": 1.0, "b": 2.0},
        ),
    ],
    ids=["scores", "accuracy", "regression", "two-sources"],
)
def test_what_is_drawn_beside_the_loss(evals, title, curves):
    axes = new_figure(4, 4).add_subplot()
    draw_evaluations(axes, evals)
    assert axes.get_title(loc="left") == title
    assert {line.get_label(): float(line.get_ydata()[0]) for line in axes.get_lines()} == curves


def test_a_line_for_an_evaluation_has_the_scores_of_its_task(capsys):
    display = RunDisplay("finetune", 10, every=10, eval_every=5, mfu=False, compiled=False)
    display.show(task_row(5, accuracy=0.5, macro_f1=0.25))
    display.show(task_row(10, accuracy=None, pearson=-0.125, spearman=None))
    assert capsys.readouterr().err.splitlines() == [
        "step 5: validation loss 3.0000, accuracy 50.0%, macro_f1 0.25",
        "step 10: validation loss 3.0000, pearson -0.125",
    ]


@pytest.mark.parametrize(("compiled", "left"), [(True, "0:50"), (False, "3:20")])
def test_what_compiles_once_does_not_count_in_the_time_left(capsys, compiled, left):
    display = RunDisplay("pretrain", 105, every=1000, eval_every=20, mfu=True, compiled=compiled)
    display.show(task_row(0, accuracy=None), seconds=25.0)
    for step, seconds in enumerate((30.0, 9.0, 0.5, 0.5, 0.5), 1):
        row = {"kind": "train", "step": step, "loss": 3.0, "lr": 0.01, "mfu": None}
        display.show(row | {"step_tokens": 1000, "tokens_per_second": 1000 / seconds})
    assert f"time    about {left} for the 100 steps that are left" in capsys.readouterr().err


@pytest.mark.parametrize("live", [True, False])
def test_a_count_is_shown_with_its_rate_and_the_time_left(monkeypatch, capsys, live):
    from fat5.train.log import display

    now = iter([0.0, 10.0, 20.0, 60.0])
    monkeypatch.setattr(display.os, "isatty", lambda descriptor: live)
    monkeypatch.setattr(display.time, "perf_counter", lambda: next(now))
    with CountDisplay("examples") as count:
        count.show(100, 1100)  # of an earlier attempt: not part of the rate
        count.show(110, 1100)
        count.show(200, 1100)
    last = "predict 200 of 1,100 examples  2 a second  7:30 left"
    written = capsys.readouterr().err
    if live:
        assert [line.strip() for line in written.split("\r\x1b[K")][3:] == [last, ""]
        assert "\n" not in written
    else:
        assert written == last + "\n"


def test_steps_are_whole_numbers_on_an_axis(tmp_path, monkeypatch):
    from fat5.train.log import plots

    keys = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds")
    made = [{"kind": "train"} | dict.fromkeys(keys, step) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, target, title: figures.append(figure))
    plots.draw_comparison([tmp_path], tmp_path / "a.png")
    ticks = figures[0].axes[0].get_xticks()
    assert all(float(tick).is_integer() for tick in ticks), ticks
