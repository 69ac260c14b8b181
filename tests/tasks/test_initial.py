"""`init_from`: pretraining that begins from a checkpoint, with its vocabulary or another one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

from fat5.cli.main import main
from fat5.data import load_tokenizer
from fat5.data.shards.prepare import PrepareConfig, prepare
from fat5.data.tokenizer.json_file import ids_of
from fat5.errors import CheckpointError, ConfigurationError, TokenizerError
from fat5.model import FAT5ForConditionalGeneration, load_model
from fat5.tasks import EvaluateConfig, ModelConfig, PretrainConfig, evaluate_model, pretrain
from fat5.tasks.initial import find_initial, transfer_rows
from fat5.train import read_rows
from made_run import assert_same_run, in_child, kill_at_row, last_checkpoint, prepared, tiny
from made_tokenizers import byte_t5, sentencepiece
from stock import mt5, t5_v1_0, t5_v1_1, umt5

__all__ = ["prepared"]

SAME_LOSS = 1e-5  # the same weights and examples; the sum over packs may be taken in another order


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fat5.train.run.draw_run", lambda *arguments: None)
    monkeypatch.setattr("fat5.train.trainer.peak_flops", lambda *arguments: 1e12)


@pytest.fixture(scope="module")
def first(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of FAT5."""
    folder = tmp_path_factory.mktemp("first") / "run"
    pretrain(tiny(prepared, folder))
    return folder


@pytest.fixture(scope="module")
def other(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text, prepared with a wider tokenizer: the same tokens and three words of a user's."""
    folder = tmp_path_factory.mktemp("other")
    wider = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    wider.add_tokens(["bibliothèque", " noyaux", "Ωμέγα"])
    wider.save_pretrained(folder / "tokenizer")
    inputs = [str(prepared.parent / "corpus.jsonl")]
    prepare(PrepareConfig(inputs, str(folder / "tokenizer"), str(folder / "wide"), validation_fraction=0.1, workers=1))
    return folder / "wide"


def stock_checkpoint(folder: Path, tokenizer: Path, make: Any = t5_v1_1, **options: Any) -> Path:
    """A checkpoint of stock transformers with random weights, and its tokenizer."""
    torch.manual_seed(3)
    model = make(**({"vocab_size": 1024, "num_layers": 2, "num_decoder_layers": 2} | options))
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def continued(data: Path, output_dir: Path, init_from: Path, **changes: Any) -> PretrainConfig:
    """A short run from a checkpoint."""
    config = tiny(data, output_dir, **({"steps": 4} | changes))
    return replace(config, model=ModelConfig(), init_from=str(init_from))


def first_loss(run: Path) -> float:
    return next(row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "eval")["loss"]


def started(config: PretrainConfig) -> tuple[Any, Any, dict[str, Any]]:
    """The checkpoint's model, the run's model before its first step, and how many rows were kept, averaged, fresh."""
    from fat5.tasks.pretraining import Pretraining
    from fat5.tasks.sizes import settle
    from fat5.train.world import World

    cpu = torch.device("cpu")
    task = Pretraining.open(settle(config, World(cpu)), World(cpu))
    assert task.initial is not None
    assert task.beginning is not None
    before = FAT5ForConditionalGeneration.from_pretrained(task.initial.folder, dtype=torch.float32)
    return before, task.build_model(), task.beginning


@pytest.mark.parametrize("place", ["", "model", "checkpoints/step-8"])
def test_a_run_begins_where_another_ended(prepared: Path, first: Path, tmp_path: Path, place: str) -> None:
    """Run, model and checkpoint folder; the checkpoint's tokenizer is found by its hash."""
    summary = pretrain(continued(prepared, tmp_path / "run", first / place, steps=1))
    ended = json.loads((first / "summary.json").read_text())
    assert summary["val_loss_first"] == pytest.approx(ended["val_loss_last"], abs=SAME_LOSS)
    assert summary["init_from"]["folder"] == str(first / place)
    assert {key: summary["init_from"][key] for key in ("kept", "averaged", "fresh")} == {
        "kept": 1024,
        "averaged": 0,
        "fresh": 0,
    }
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    named = "/".join(Path(str(first / place)).parts[-2:])
    assert f"Continued from `{named}` (1,024 token embeddings kept, 0 averaged, 0 fresh)" in card
    assert str(first.parent.parent) not in card, "the path of this machine"


@pytest.mark.parametrize(
    "make",
    [t5_v1_0, t5_v1_1, umt5, pytest.param(mt5, marks=pytest.mark.slow)],  # mT5 is v1.1 under its own model_type
    ids=["v1.0", "v1.1", "umT5", "mT5"],
)
def test_the_loss_of_a_stock_checkpoint_is_the_evaluated_one(prepared: Path, tmp_path: Path, make: Any) -> None:
    """Tied and scaled, untied, a table in every layer: with the checkpoint's tokenizer nothing changes at step 0."""
    folder = stock_checkpoint(tmp_path / "stock", prepared / "tokenizer", make)
    run = tmp_path / "run"
    pretrain(continued(prepared, run, folder, steps=1))
    shapes = {"max_tokens": 64, "encoder_tokens": 256, "decoder_tokens": 128, "eval_tokens": 200}
    want = evaluate_model(EvaluateConfig(str(folder), [str(prepared)], mixture="fat5", precision="fp32", **shapes))
    assert first_loss(run) == pytest.approx(want["loss"], abs=SAME_LOSS)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, run / "model"))
    for key in ("model_type", "feed_forward_proj", "d_ff", "num_layers", "num_heads", "dropout_rate"):
        assert after[key] == before[key], key
    loaded = AutoModelForSeq2SeqLM.from_pretrained(run / "model")
    assert type(loaded).__name__ == before["architectures"][0]
    ours = FAT5ForConditionalGeneration.from_pretrained(run / "model")
    tied = make is t5_v1_0
    assert (ours.lm_head.weight is ours.shared.weight) is tied
    assert (
        ours.config.scale_decoder_outputs
        is FAT5ForConditionalGeneration.from_pretrained(folder).config.scale_decoder_outputs
    )


def test_a_wider_vocabulary_keeps_every_row(prepared: Path, first: Path, other: Path, tmp_path: Path) -> None:
    before, after, report = started(continued(other, tmp_path / "run", first))
    old, new = load_tokenizer(prepared / "tokenizer"), load_tokenizer(other / "tokenizer")
    assert after.config.vocab_size == 1152
    for name in ("shared", "lm_head"):
        had, has = (getattr(model, name).weight for model in (before, after))
        assert torch.equal(has[:1024], had)
        for token, ids in (
            ("bibliothèque", old.encode("bibliothèque", after="(")),
            (" noyaux", old.encode(" noyaux", after="(")),
            ("Ωμέγα", old.encode("Ωμέγα", after="(")),
        ):
            row = has[ids_of(new.content, "")[token]]
            assert len(ids) > 1
            assert torch.equal(row, torch.stack([had[one].double() for one in ids]).mean(0).float()), token
        assert torch.equal(has[1100], had.double().mean(0).float())
    assert (report["kept"], report["averaged"], report["fresh"]) == (1024, 3, 125)
    for name, weight in before.named_parameters():
        if name not in ("shared.weight", "lm_head.weight"):
            assert torch.equal(weight, after.get_parameter(name)), name


@pytest.mark.parametrize("make", [t5_v1_0, t5_v1_1], ids=["tied", "untied"])
def test_another_vocabulary_keeps_equal_texts(prepared: Path, tmp_path: Path, make: Any) -> None:
    """T5's SentencePiece, whose words begin with ▁, to FAT5's BPE, whose words begin with a space."""
    sentencepiece(tmp_path / "tokenizer")
    folder = stock_checkpoint(tmp_path / "stock", tmp_path / "tokenizer", make, vocab_size=128)
    before, after, report = started(continued(prepared, tmp_path / "run", folder))
    old, new = (load_tokenizer(path) for path in (folder, prepared / "tokenizer"))
    was, now = ids_of(old.content, ""), ids_of(new.content, "")
    tables = [(before.shared.weight, after.shared.weight), (before.lm_head.weight, after.lm_head.weight)]
    assert (after.lm_head.weight is after.shared.weight) is (make is t5_v1_0)
    for had, has in tables:
        equal = {" de": "▁de", "e": "e", " ": "▁", "é": "é", "<pad>": "<pad>", "</s>": "</s>", "<unk>": "<unk>"}
        for token, same in (equal | {f"<extra_id_{index}>": f"<extra_id_{index}>" for index in range(10)}).items():
            assert torch.equal(has[now[token]], had[was[same]]), token
        for token, pieces in ((" d", ["▁", "d"]), ("tion", list("tion")), (" par", ["▁", *"par"])):
            want = torch.stack([had[was[piece]].double() for piece in pieces]).mean(0).float()
            assert torch.equal(has[now[token]], want), token
        sentinels = had[[was[f"<extra_id_{index}>"] for index in range(10)]].double().mean(0).float()
        assert torch.equal(has[now["<extra_id_200>"]], sentinels)
        fresh = had[: old.own_size].double().mean(0).float()
        for token in ("[R]", "[S]", "[X]", "<0xC3>", "L"):  # what the old tokenizer cannot write
            assert torch.equal(has[now[token]], fresh), token
    assert report["kept"] + report["averaged"] + report["fresh"] == 1024
    assert min(report["kept"], report["averaged"], report["fresh"]) > 20
    pretrain(continued(prepared, tmp_path / "run", folder, steps=1))
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "model")) is T5ForConditionalGeneration


def test_byt5_gets_rows_for_the_mode_tokens(tmp_path: Path, prepared: Path) -> None:
    """Its 384 rows are all taken: the mode tokens of FAT5 need new ones."""
    folder = stock_checkpoint(tmp_path / "stock", byte_t5(tmp_path / "tokenizer"), t5_v1_1, vocab_size=384)
    inputs = [str(prepared.parent / "corpus.jsonl")]
    prepare(PrepareConfig(inputs, str(folder), str(tmp_path / "bytes"), validation_fraction=0.1, workers=1))
    before, after, report = started(continued(tmp_path / "bytes", tmp_path / "run", folder))
    assert torch.equal(after.shared.weight[:384], before.shared.weight)
    assert torch.equal(after.lm_head.weight[384], before.lm_head.weight.double().mean(0).float())
    assert (after.config.vocab_size, report["kept"], report["fresh"]) == (512, 384, 128)


def test_rows_beyond_the_tokenizer_stay(prepared: Path, tmp_path: Path) -> None:
    folder = stock_checkpoint(tmp_path / "stock", prepared / "tokenizer", vocab_size=1300)
    before, after, report = started(continued(prepared, tmp_path / "run", folder))
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert (report["kept"], report["fresh"]) == (1300, 0)


def test_an_untied_head_in_a_checkpoint_that_says_tied(prepared: Path, tmp_path: Path) -> None:
    """Stock transformers says "tied" of every T5 it saves again; the weights decide, also for the memory plan."""
    folder = stock_checkpoint(tmp_path / "stock", prepared / "tokenizer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    before, after, _ = started(continued(prepared, tmp_path / "run", folder))
    assert after.lm_head.weight is not after.shared.weight
    assert torch.equal(after.lm_head.weight, before.lm_head.weight)


@pytest.mark.parametrize("make", [t5_v1_0, t5_v1_1], ids=["tied", "untied"])
def test_a_pickle_of_tensors_in_bfloat16(prepared: Path, tmp_path: Path, make: Any) -> None:
    """As old checkpoints are; the weights are read in float32, and stay so."""
    folder = stock_checkpoint(tmp_path / "stock", prepared / "tokenizer", make)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = True
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    config = continued(prepared, tmp_path / "run", folder, steps=2)
    _, after, report = started(config)
    assert report["kept"] == 1024
    assert {weight.dtype for weight in after.parameters()} == {torch.float32}
    assert torch.equal(after.lm_head.weight, model.lm_head.weight.float())
    assert (after.lm_head.weight is after.shared.weight) is (make is t5_v1_0)
    pretrain(config)
    assert load_model(last_checkpoint(tmp_path / "run"), device="cpu").shared.weight.dtype == torch.float32


SLOW = [pytest.param(positions, marks=pytest.mark.slow) for positions in ("alibi", "rope")]


@pytest.mark.parametrize("positions", ["absolute", "fire", *SLOW])
def test_positions_are_the_checkpoint_s(prepared: Path, other: Path, tmp_path: Path, positions: Any) -> None:
    config = tiny(prepared, tmp_path / "one", steps=2)
    one = pretrain(replace(config, model=replace(config.model, position_encoding=positions)))
    two = pretrain(continued(prepared, tmp_path / "two", tmp_path / "one", steps=2))
    assert two["val_loss_first"] == pytest.approx(one["val_loss_last"], abs=SAME_LOSS)
    pretrain(continued(other, tmp_path / "three", tmp_path / "two", steps=1))
    recipe = yaml.safe_load((tmp_path / "three" / "config.yaml").read_text())
    assert recipe["model"] == {"preset": "init_from", "position_encoding": positions, "overrides": {}}
    model = load_model(tmp_path / "three" / "model", device="cpu")
    assert (model.config.position_encoding, model.config.vocab_size) == (positions, 1152)


def test_kill_and_resume_are_the_same_run(prepared: Path, other: Path, first: Path, tmp_path: Path) -> None:
    """Also where the folder is gone when the run goes on."""
    base = Path(shutil.copytree(first, tmp_path / "base"))
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    pretrain(continued(other, clean, base, steps=6))

    def work() -> None:
        kill_at_row(6)()
        pretrain(continued(other, killed, base, steps=6))

    assert in_child(work) == -9
    shutil.rmtree(base)
    pretrain(continued(other, killed, base, steps=6))
    assert_same_run(clean, killed)
    one, two = (json.loads((run / "summary.json").read_text())["init_from"] for run in (clean, killed))
    assert one == two


def test_a_death_before_the_first_checkpoint_begins_again(prepared: Path, first: Path, tmp_path: Path) -> None:
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    pretrain(continued(prepared, clean, first))

    def work() -> None:
        kill_at_row(2)()
        pretrain(continued(prepared, killed, first))

    assert in_child(work) == -9
    assert not (killed / "checkpoints").exists()
    pretrain(continued(prepared, killed, first))
    assert_same_run(clean, killed)


def test_another_beginning_is_refused(prepared: Path, first: Path, tmp_path: Path) -> None:
    run, base = tmp_path / "run", Path(shutil.copytree(first, tmp_path / "base"))
    pretrain(continued(prepared, run, base, steps=2))
    moved = base.rename(tmp_path / "moved")
    pretrain(continued(prepared, run, moved, steps=2))  # the same weights elsewhere
    with pytest.raises(CheckpointError, match=r"gone.*does not exist"):
        pretrain(continued(prepared, run, tmp_path / "gone", steps=2))
    with pytest.raises(CheckpointError, match=r"init_from\.sha256 was '\w+' and is now '\w+'"):
        pretrain(continued(prepared, run, first / "checkpoints" / "step-6", steps=2))
    with pytest.raises(ConfigurationError, match=r"init_from is not given.*--init_from FOLDER"):
        pretrain(replace(continued(prepared, run, moved, steps=2), init_from=None))
    plain = tmp_path / "plain"
    pretrain(tiny(prepared, plain, steps=2))
    with pytest.raises(CheckpointError, match=r"init_from\.sha256 was '\(not set\)'"):
        pretrain(continued(prepared, plain, moved, steps=2))


def test_the_recipe_of_a_run_makes_it_again(prepared: Path, first: Path, tmp_path: Path) -> None:
    pretrain(continued(prepared, tmp_path / "one", first, steps=2))
    recipe = ["--config", str(tmp_path / "one" / "config.yaml"), "--output_dir", str(tmp_path / "two")]
    assert main(["pretrain", *recipe]) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_keys_that_leave_the_weights_may_change(prepared: Path, first: Path, tmp_path: Path) -> None:
    config = continued(prepared, tmp_path / "run", first)
    overrides = {"dropout_rate": 0.25, "z_loss": 1e-4, "relative_attention_max_distance": 512, "d_ff": 64}
    _, after, _ = started(replace(config, model=ModelConfig(overrides=overrides)))
    assert {key: getattr(after.config, key) for key in overrides} == overrides


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (ModelConfig(preset="fat5-demo"), "model.preset: fat5-demo has .* and the checkpoint"),
        (ModelConfig(preset="fat5-tiny"), "preset: expected fat5-small"),
        (ModelConfig(position_encoding="alibi"), "model.position_encoding: is alibi, and the checkpoint .* has t5"),
        (ModelConfig(overrides={"d_model": 64}), "model.overrides.d_model: is 64, .* have 32"),
        (ModelConfig(overrides={"feed_forward_proj": "relu"}), "model.overrides.feed_forward_proj: is 'relu'"),
        (ModelConfig(overrides={"tie_word_embeddings": True}), "model.overrides.tie_word_embeddings: is True"),
        (ModelConfig(overrides={"vocab_size": 2048}), "model.overrides.vocab_size is set by the run itself"),
        (ModelConfig(overrides={"dropout_rate": 2.0}), "dropout_rate: expected a number"),
        (ModelConfig(overrides={"dropout": 0.1}), "no key 'dropout'. Did you mean dropout_rate"),
    ],
)
def test_another_model_is_refused(prepared: Path, first: Path, tmp_path: Path, model: ModelConfig, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        pretrain(replace(continued(prepared, tmp_path / "run", first), model=model))
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_cannot_work_are_refused(prepared: Path, first: Path, tmp_path: Path) -> None:
    def refused(folder: Path, error: type[Exception], told: str) -> None:
        with pytest.raises(error, match=told):
            pretrain(continued(prepared, tmp_path / "run", folder))
        assert not (tmp_path / "run").exists()

    small: Any = dict(vocab_size=1024, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tokenizer = prepared / "tokenizer"
    T5EncoderModel(T5Config(**small)).save_pretrained(tmp_path / "encoder")
    refused(
        tmp_path / "encoder", CheckpointError, "class …EncoderModel, and pretraining needs …ForConditionalGeneration"
    )
    T5ForSequenceClassification(T5Config(**small)).save_pretrained(tmp_path / "head")
    refused(tmp_path / "head", CheckpointError, "class …ForSequenceClassification")
    BertConfig().save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", CheckpointError, "type 'bert'")
    refused(tmp_path / "nowhere", CheckpointError, "does not exist")
    bare = stock_checkpoint(tmp_path / "bare", tokenizer)
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    refused(bare, TokenizerError, "holds no tokenizer.*--init_tokenizer DIR")
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        pretrain(replace(continued(prepared, tmp_path / "run", bare), init_tokenizer=str(tmp_path / "head")))
    few = stock_checkpoint(tmp_path / "few", tokenizer, vocab_size=1000)
    refused(few, TokenizerError, "1,024 tokens, and the model only 1,000 rows.*--init_tokenizer DIR")
    quantised = stock_checkpoint(tmp_path / "quantised", tokenizer)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bnb"}}))
    refused(quantised, CheckpointError, "holds quantised weights")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(adapter, CheckpointError, "adapter of PEFT")
    broken = stock_checkpoint(tmp_path / "broken", tokenizer)
    weights = load_file(broken / "model.safetensors")
    weights["shared.weight"][3, 3] = float("nan")
    save_file(weights, broken / "model.safetensors")
    refused(broken, CheckpointError, "shared.weight holds NaN")
    pickle = stock_checkpoint(tmp_path / "pickle", tokenizer)
    (pickle / "model.safetensors").rename(pickle / "model.pt")
    refused(pickle, CheckpointError, "pickle|no model.safetensors")


def test_a_tokenizer_elsewhere_is_named(prepared: Path, other: Path, tmp_path: Path) -> None:
    bare = stock_checkpoint(tmp_path / "bare", prepared / "tokenizer")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    config = continued(other, tmp_path / "run", bare)
    _, _, report = started(replace(config, init_tokenizer=str(prepared / "tokenizer")))
    assert (report["kept"], report["averaged"]) == (1024, 3)


def test_the_tokenizer_of_a_moved_checkpoint_is_asked_for(
    prepared: Path, other: Path, first: Path, tmp_path: Path
) -> None:
    """A checkpoint has the hash of its tokenizer alone."""
    alone = Path(shutil.copytree(last_checkpoint(first), tmp_path / "alone"))
    with pytest.raises(TokenizerError, match="--init_tokenizer DIR"):
        find_initial(continued(other, tmp_path / "run", alone))
    assert find_initial(continued(prepared, tmp_path / "run", alone)) is not None


def test_the_doctor_counts_the_checkpoint(prepared: Path, first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--json_output", "--init_from", str(first), "--data.sources", json.dumps([{"path": str(prepared)}])]
    assert main(["doctor", *flags]) == 0
    lines = {line["what"]: line for line in json.loads(capsys.readouterr().out)}
    parameters = json.loads((first / "summary.json").read_text())["parameters"]
    assert lines["model"]["found"] == f"continued from {first}: {parameters:,} parameters"
    assert main(["doctor", *flags, "--model.preset", "fat5-base"]) == 2
    assert "fat5-base has" in capsys.readouterr().out


def test_the_first_lines_say_where_it_comes_from(
    other: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(continued(other, tmp_path / "run", first, steps=1))
    told = capsys.readouterr().err
    assert f"model   continued from {first}, " in told
    assert "rows    1,152 embeddings: 1,024 kept, 3 averaged, 125 fresh" in told


def test_means_are_those_of_float64() -> None:
    from fat5.data.tokenizer.matching import TokenMatch

    table = torch.randn(7, 5)
    match = TokenMatch(torch.tensor([3, -1, -1, 0]).numpy(), {1: [2, 4, 4]})
    rows = transfer_rows(table, match, used=6)
    assert torch.equal(rows[[0, 3]], table[[3, 0]])
    assert torch.equal(rows[1], ((table[2].double() + 2 * table[4].double()) / 3).float())
    assert torch.equal(rows[2], table[:6].double().mean(0).float())
