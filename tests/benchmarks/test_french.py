"""benchmarks/french.py: its span corruption, the stock side of the clock, and (slow) all of it at tiny size."""

import json
import shutil
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fat5.cli.parsing import parse
from fat5.data import load_tokenizer, read_manifest, reconstruct
from fat5.model import FAT5ForConditionalGeneration
from fat5.tasks import PretrainConfig
from fat5.tasks.finetune.config import FinetuneConfig
from fat5.train.evaluation import Scorer
from fat5.train.precision import Precision
from fat5.train.world import World
from made_run import prepare_sample

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import french  # noqa: E402
import french_runs  # noqa: E402
import french_stock  # noqa: E402
import french_texts  # noqa: E402
import results  # noqa: E402
import results_parts  # noqa: E402

ROUNDING = 1e-4
"""Relative, float32, padded beside packed."""
PAIRS = [{"source": f"Le noyau {n} gère la mémoire.", "target": f"Kernel {n} manages memory."} for n in range(60)]
TEXTS = [
    {"text": f"La page {n} décrit une commande du système, avec ses options et sa place.", "label": "ab"[n % 2]}
    for n in range(60)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and two tasks, as french.py takes them."""
    folder = tmp_path_factory.mktemp("french")
    prepare_sample(folder).rename(folder / "shards")
    for task, rows in (("fr-en", PAIRS), ("module", TEXTS)):
        (folder / "tasks" / task).mkdir(parents=True)
        for split in ("train", "validation", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "tasks" / task / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def bench(data: Path, folder: Path, **more: Any) -> french_runs.Bench:
    options = {
        "data": data, "work": folder / "work", "output_dir": folder / "out", "archive": None, "tiny": True, "seeds": 2,
        "preset": "fat5-demo", "at_once": 2, "ablation_steps": 4, "tasks": "fr-en,module", "starts": "random",
    }  # fmt: skip
    found = french_runs.Bench(Namespace(**options | more))
    found.deadline = float("inf")
    return found


def test_span_corruption_is_t5s(data: Path) -> None:
    tokenizer = load_tokenizer(data / "shards" / "tokenizer")
    info, random = tokenizer.info, np.random.default_rng(0)
    sentinels = np.array([tokenizer.backend.token_to_id(f"<extra_id_{n}>") for n in range(100)])
    collator = french_texts.SpanCorruption(sentinels, info.eos_id, info.pad_id)
    ordinary = np.flatnonzero(~tokenizer.is_reserved(np.arange(info.vocab_size)))
    hidden, spans = [], []
    for length in (2, 3, 20, 100, 568):
        for _ in range(20):
            ids = random.choice(ordinary, length)
            inputs, targets = collator.corrupt(ids, random)
            assert np.array_equal(reconstruct(inputs, targets, info), ids)
            hidden.append(len(ids) - np.isin(inputs, ordinary).sum())
            spans.append(np.isin(targets, sentinels).sum())
            assert (hidden[-1], spans[-1]) == french_texts.noise_of(length, 100)
    assert french_texts.chunk_length(512) == 568  # and its targets have 114 tokens: T5's own preparation
    assert sum(french_texts.noise_of(568, 256)) + 1 == 114
    collator.random = random
    collator.widths = (64, 256, 512)
    for width, lengths in ((64, (2, 68)), (256, (2, 80)), (512, (568, 2)), (928, (1024, 2))):
        batch = collator([{"input_ids": random.choice(ordinary, length)} for length in lengths])
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, width)
        assert batch["attention_mask"].sum(1).tolist() == [(row != info.pad_id).sum() for row in batch["input_ids"]]
        assert [(row != -100).sum() for row in batch["labels"]] == [
            sum(french_texts.noise_of(length, 100)) + 1 for length in lengths
        ]
    firsts = [french_texts.parts(10, 2, random)[0] for _ in range(3000)]
    assert np.allclose(np.bincount(firsts, minlength=10)[1:10] / 3000, 1 / 9, atol=0.03)


def test_stock_batches_have_similar_lengths_in_random_order() -> None:
    lengths = np.random.default_rng(1).integers(1, 1000, 1003)
    groups = french_texts.ShuffledGroups(lengths.tolist(), 4, 0)
    first, second = list(groups), list(groups)
    assert len(first) == len(groups) == 250
    assert first != second
    for batches in (first, second):
        assert len({index for batch in batches for index in batch}) == 1000
        assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 30  # of random ones about 600
        longest = np.array([lengths[batch].max() for batch in batches])
        assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.2


def test_both_sides_of_the_clock_start_and_are_scored_alike(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights and the same validation examples give the same loss; then the stock side learns."""
    more = {"data.mixture": "t5", "precision": "fp32", **french.scheduled(12)}
    keys = french.pretraining(bench(data, tmp_path), "fat5-demo", **more)
    run = tmp_path / "stock"
    words = ["--train_seconds", "4", "--text", "documents", "--rows", "4", *keys, "--output_dir", str(run)]
    monkeypatch.setattr(sys, "argv", ["french_stock.py", *words])
    monkeypatch.setattr(french_stock.signal, "signal", lambda *_: None)  # pytest has its own
    french_stock.main()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train, scores = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    assert scores[-1]["loss"] < scores[0]["loss"] - 0.3
    assert train[-1]["tokens"] > train[0]["tokens"] > 0
    assert train[0]["loss"] == pytest.approx(scores[0]["loss"], rel=0.1)  # the mean of the batches of a step
    assert json.loads((run / "summary.json").read_text())["accumulated"] > 1
    assert 3 < train[-1]["seconds"] < 6
    assert train[-1]["lr"] < train[len(train) // 2]["lr"]  # the schedule runs by the clock
    config = french_stock.PretrainConfig(
        **french_stock.parse(french_stock.PretrainConfig, [*keys, "--output_dir", "x"], "pretrain")
    )
    world = World(torch.device("cpu"))
    task = french_stock.Pretraining.open(french_stock.settle(config, world), world)
    torch.manual_seed(0)
    model = FAT5ForConditionalGeneration(task.model_config)
    ours = task.evaluate(Scorer(model, Precision("fp32", world.device), world, model))
    assert ours["loss"] == pytest.approx(scores[0]["loss"], rel=ROUNDING)
    assert (ours["accuracy"], ours["tokens"]) == pytest.approx((scores[0]["accuracy"], scores[0]["tokens"]), rel=1e-2)
    trained = FAT5ForConditionalGeneration.from_pretrained(run / "model")
    after = task.evaluate(Scorer(trained, Precision("fp32", world.device), world, trained))
    assert after["loss"] == pytest.approx(scores[-1]["loss"], rel=ROUNDING)


def test_a_killed_run_leaves_what_it_has_and_is_run_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = bench(data, tmp_path, archive=tmp_path / "all.tar.gz")
    write = "import json, pathlib, sys, time; f = pathlib.Path(sys.argv[2]); f.mkdir(exist_ok=True, parents=True);"
    write += "row = dict(kind='train', step=1, loss=1.0, lr=1, grad_norm=1, tokens=9, tokens_per_second=9, seconds=1);"
    write += "(f / 'metrics.jsonl').write_text(json.dumps(row) + chr(10)); (f / 'config.yaml').write_text('steps: 9');"
    job = french_runs.Job("long", {"section": "small"}, [sys.executable, "-c", f"{write} time.sleep(60)"])
    assert not it.run_alone(job, (0.5, None))
    kept = tmp_path / "out" / "long"
    assert (kept / "metrics.jsonl").is_file()
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        assert "./long/metrics.jsonl" in archive.getnames()
    monkeypatch.setattr(
        it, "stamp", {"command": f"french.py {data} --output_dir {it.output} --archive {it.options.archive}"}
    )
    assert not it.is_complete("long")
    assert it.facts("long")["exit_code"] == -15
    job.command[-1] = write
    assert it.run_alone(job, (0.5, None))
    assert it.is_complete("long")
    assert it.facts("long")["command"] == "french.py data --output_dir results --archive all.tar.gz"
    assert len((kept / "command.txt").read_text().splitlines()) == 2


def test_power_is_summed_while_a_run_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nwhile true; do echo '360.0, 2048'; sleep 0.05; done\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{french.os.environ['PATH']}")
    monkeypatch.setattr(french_runs, "GPU", True)
    with french_runs.Card("0") as card:
        begun = time.monotonic()
        while len(card.samples) < 10 and time.monotonic() < begun + 20:
            time.sleep(0.05)
    found, samples = card.summary(), card.samples
    assert found["power_w"] == pytest.approx(360)
    assert found["memory_gib"] == 2
    assert found["energy_wh"] == pytest.approx(0.1 * (samples[-1][0] - samples[0][0]))
    assert french_runs.Card("0").summary() == {}


def test_metrics_are_thinned_but_for_evaluations(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for step in range(2001):
        if step:
            common = {"step": step, "loss": 1.0, "lr": 1, "grad_norm": 1, "tokens": step, "seconds": 60.0 + step}
            rows.append({"kind": "train", **common, "step_tokens": 5, "tokens_per_second": 10.0, "raw_tokens": 1})
        if step % 500 == 0:
            rows.append({"kind": "eval", "step": step, "loss": 1.0, "accuracy": 0.5})
    (tmp_path / "m").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [json.loads(line) for line in french_runs.thinned(tmp_path / "m").splitlines()]
    assert [row["step"] for row in kept if row["kind"] == "eval"] == [0, 500, 1000, 1500, 2000]
    assert 300 < len(kept) < 410
    assert [row["step"] for row in kept] == sorted(row["step"] for row in kept)
    assert kept[-2] == rows[-2] | {"trained": 0.5 * 1999}  # of 2,000 steps of half a second, the first does not count


def test_sources_have_the_shares_of_their_tokens(data: Path, tmp_path: Path) -> None:
    """In a unit that the loader takes."""
    both = tmp_path / "both"
    for name in ("shards", "shards-en"):
        shutil.copytree(data / "shards", both / name)
    words = french.pretraining(bench(both, tmp_path), "fat5-demo")
    sources = json.loads(words[words.index("--data.sources") + 1])
    assert [Path(source["path"]).name for source in sources] == ["shards", "shards-en"]
    tokens = read_manifest(data / "shards").tokens("train")
    assert [source["weight"] for source in sources] == [pytest.approx(tokens / 1e6, abs=1e-3)] * 2
    assert 0 < sources[0]["weight"]


def test_sentences_are_held_out_ones_with_a_blank(data: Path, tmp_path: Path) -> None:
    found = list(french.sentences(bench(data, tmp_path)))
    assert len(found) == french.SENTENCES
    for blanked, whole in found:
        before, after = blanked.split("___")
        assert whole.startswith(before)
        assert whole.endswith(after)
        assert whole in {row["text"] for row in TEXTS}


@pytest.mark.parametrize("tiny", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["real", "tiny"])
def test_every_command_is_one_that_its_verb_takes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: bool
) -> None:
    commands: dict[str, list[str]] = {}

    def record(_: Any, *jobs: Any) -> bool:
        for job in (one for one in jobs if isinstance(one, french_runs.Job)):
            assert job.name not in commands or job.name.startswith("default")
            commands[job.name] = job.command
        return True

    def record_all(bench: Any, jobs: Any, at_once: int = 0) -> None:
        record(bench, *jobs)

    monkeypatch.setattr(french_runs.Bench, "run_alone", record)
    monkeypatch.setattr(french_runs.Bench, "run_together", record_all)
    monkeypatch.setattr(french_runs.Bench, "rehearse", record_all)
    monkeypatch.setattr(french_runs.Bench, "measure_rate", lambda bench, job, seconds: 20.0)
    monkeypatch.setattr(french_runs.Bench, "model", lambda bench, name: tmp_path)
    options = {"tiny": tiny, "starts": ",".join(french.STARTS), "tasks": ",".join(french.TASKS), "clock_seconds": 60.0}
    it = bench(data, tmp_path, **options)
    it.deadline = french.time.monotonic() + 300
    for section in ("rehearsal", "small", "base", "clock", "finetune", "ablations"):
        french.SECTIONS[section](it)
    tuned = 2 * len(french.STARTS) + len(french.MIXTURES) + 1
    assert len(commands) == 4 + 5 + tuned + 2 * len(french.variants(french.KINDS))
    for name, command in commands.items():
        verb = command[command.index("fat5") + 1] if "fat5" in command else "pretrain"
        words = command[command.index("--config") :] if verb == "pretrain" else command[command.index("fat5") + 2 :]
        kind = PretrainConfig if verb == "pretrain" else FinetuneConfig
        config = kind(**parse(kind, [*words, "--output_dir", "x"], verb)).resolved()
        assert config.steps == "auto" or 4 <= config.steps < 10**5, name


@pytest.mark.slow
def test_everything_at_tiny_size(data: Path, tmp_path: Path) -> None:
    """All sections through their processes, and the page of what they leave."""
    sections = "rehearsal,small,base,clock,finetune,ablations"
    command = [sys.executable, str(ROOT / "benchmarks" / "french.py"), str(data), "--tiny", "--sections", sections]
    command += ["--seconds", "900", "--seeds", "1", "--output_dir", str(tmp_path / "out")]
    command += ["--work", str(tmp_path / "work"), "--archive", str(tmp_path / "all.tar.gz"), "--at_once", "2"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    runs = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/run.json")}
    assert all(run["complete"] for run in runs.values()), said
    starts = ("small", "clock_fat5", "clock_stock", "clock_joined", "base", "random")
    assert {f"{task}-from-{start}" for task in ("fr-en", "module") for start in starts} <= runs.keys()
    for kind, variants in (("positions", french.POSITIONS), ("mixtures", french.MIXTURES), ("padding", ["padded"])):
        assert {f"{kind}-{one}-seed0" for one in variants} <= runs.keys()
    assert len((tmp_path / "out" / "small" / "filled.jsonl").read_text().splitlines()) == french.SENTENCES
    results.take_over(tmp_path / "out", tmp_path / "as" / "french")
    events = (tmp_path / "out" / "small" / "events.jsonl").read_text()
    assert '"stopped"' in events
    assert '"resumed"' in events
    page = results.render(tmp_path / "as")
    assert page.count(results_parts.NOT_RUN) == 2, page  # the counts of the corpus, and the run on another device
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "out").rglob("*.json"))
