"""Fault 12: the configuration changed on resume. Harmless keys pass, some are warned about, the rest is refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fat5.errors import CheckpointError
from fat5.optim import OptimizerConfig, ScheduleConfig
from fat5.tasks import PretrainConfig, pretrain
from fat5.train.checkpoint.compare import HARMLESS, WARNED, check_changes
from made_run import events, tiny


@pytest.fixture(scope="module")
def begun(prepared, tmp_path_factory):
    run = tmp_path_factory.mktemp("begun") / "run"
    pretrain(tiny(prepared, run, steps=2))
    return run


def again(prepared, begun, tmp_path, **changes):
    shutil.copytree(begun, tmp_path / "run")
    return tiny(prepared, tmp_path / "run", **({"steps": 2} | changes))


REFUSED = {
    "seed": ({"seed": 1}, "seed was 0 and is now 1"),
    "data": ({"data": {"max_tokens": 32}}, "data.max_tokens was 64 and is now 32"),
    "mixture": ({"data": {"mixture": "t5"}}, "data.mixture was 'fat5' and is now 't5'"),
    "positions": (None, "model.position_encoding was 't5' and is now 'alibi'"),
    "width": ({"overrides": {"d_ff": 128}}, "model.overrides.d_ff was 64 and is now 128"),
    "batch": ({"data": {"packs_per_step": 4}}, "data.packs_per_step was 2 and is now 4"),
    "optimizer": ({"optimizer": OptimizerConfig(name="adamw")}, "optimizer.name was 'adamw_scale' and is now 'adamw'"),
    "weights": ({"precision": "bf16-pure"}, "precision was 'fp32' and is now 'bf16-pure'"),
}


@pytest.mark.parametrize(("changes", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_both_values(prepared, begun, tmp_path, changes, named):
    config = again(prepared, begun, tmp_path, **(changes or {}))
    if changes is None:
        config = replace(config, model=replace(config.model, position_encoding="alibi"))
    recipe = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match="comes from another configuration") as refusal:
        pretrain(config)
    assert named in str(refusal.value)
    assert (tmp_path / "run" / "config.yaml").read_text() == recipe, "refused before anything was touched"


def test_other_data_and_tokenizer_are_refused(prepared, begun, tmp_path):
    """The same path with other content; a copy elsewhere is the same data."""
    import gzip

    from fat5.data import sample_path
    from fat5.data.shards.prepare import PrepareConfig, prepare
    from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer

    rows = gzip.decompress(Path(sample_path("de")).read_bytes()).decode().splitlines(keepends=True)[:100]
    (tmp_path / "german.jsonl").write_text("".join(rows))
    inputs = [str(tmp_path / "german.jsonl")]
    train_tokenizer(TokenizerTraining(inputs, str(tmp_path / "tokenizer"), vocab_size=1152))
    other = tmp_path / "other"
    prepare(PrepareConfig(inputs, str(tmp_path / "tokenizer"), str(other), validation_fraction=0.2, workers=1))
    with pytest.raises(CheckpointError) as refusal:
        pretrain(again(other, begun, tmp_path))
    for key in ("tokenizer was", "vocab_size was 1024 and is now 1152", "data.sources was"):
        assert key in str(refusal.value)


def test_moved_data_and_harmless_keys_pass(prepared, begun, tmp_path, capfd):
    shutil.copytree(prepared, tmp_path / "moved")
    pretrain(again(tmp_path / "moved", begun, tmp_path, log_every=1, keep_last=5, data={"num_workers": 1}))
    assert "warning" not in capfd.readouterr().err
    assert events(tmp_path / "run")[-2]["warnings"] == []


def test_learning_rate_like_keys_are_warned_about(prepared, begun, tmp_path, capfd):
    changes = {"optimizer": OptimizerConfig(lr=0.01), "schedule": ScheduleConfig(name="constant")}
    pretrain(again(prepared, begun, tmp_path, steps=3, gradient_clip=None, **changes))
    told = capfd.readouterr().err
    for key in ("optimizer.lr was 0.02", "schedule.name was 'cosine'", "steps was 2", "gradient_clip was 1.0"):
        assert f"warning: {key} when the checkpoint was made and is now" in told


def test_the_new_learning_rate_is_the_one_used(prepared, begun, tmp_path):
    from made_run import rows_without_times

    changes = {"optimizer": OptimizerConfig(lr=0.005), "schedule": ScheduleConfig(name="constant")}
    pretrain(again(prepared, begun, tmp_path, steps=3, **changes))
    assert [row["lr"] for row in rows_without_times(tmp_path / "run") if row["kind"] == "train"][-1] == 0.005


def test_fewer_steps_than_are_done_are_refused(prepared, begun, tmp_path):
    """The old weights were exported beside another evaluation's loss and another schedule."""
    config = again(prepared, begun, tmp_path, steps=1)
    made = {name: (tmp_path / "run" / name).read_bytes() for name in ("config.yaml", "metrics.jsonl", "summary.json")}
    with pytest.raises(CheckpointError, match=r"step-2: is of step 2, and the run would end at step 1\. Ask for 2"):
        pretrain(config)
    assert all((tmp_path / "run" / name).read_bytes() == content for name, content in made.items())


def test_every_key_is_judged():
    """A key of the configuration that no list names would be refused; that must be meant, so it is written here."""
    meant = {"seed", "model", "data"}
    for key in PretrainConfig.__dataclass_fields__:
        parts = (*HARMLESS, *WARNED)
        assert key in meant or any(part.split(".")[0] == key for part in parts), key
    with pytest.raises(CheckpointError, match=r"new_key was '\(not set\)' and is now 1"):
        check_changes({}, {"new_key": 1}, "here")


def test_never_and_a_path(prepared, begun, tmp_path):
    from fat5.errors import RunDirectoryError

    with pytest.raises(RunDirectoryError, match="holds a run, and resume is never"):
        pretrain(again(prepared, begun, tmp_path, resume="never"))
    summary = pretrain(tiny(prepared, tmp_path / "fork", steps=3, resume=str(begun / "checkpoints" / "step-2")))
    assert summary["steps"] == 3
    with pytest.raises(CheckpointError, match=r"step-7: no such checkpoint\. There is step-"):
        pretrain(tiny(prepared, tmp_path / "other", steps=3, resume=str(begun / "checkpoints" / "step-7")))
    with pytest.raises(CheckpointError, match="has a newer checkpoint of step 3"):
        pretrain(tiny(prepared, tmp_path / "fork", steps=3, resume=str(begun / "checkpoints" / "step-2")))
