"""What doctor predicts of several devices, against what was measured."""

import json
from pathlib import Path

import pytest

from fat5.cli.main import main
from fat5.errors import ConfigurationError
from fat5.tasks import DataConfig, ModelConfig, PretrainConfig, pretrain
from fat5.tasks.forecast import KNOWN, PlannedWorld, predict_speed
from fat5.tasks.sizes import configure_model, on_meta
from fat5.train import read_rows
from fat5.train.cost.memory import GIB, plan_memory
from fat5.train.cost.speed import measured_run
from fat5.train.log.metrics import ROW_KEYS
from made_run import tiny

WITHIN = 0.15
"""Of what is measured."""


class Info:
    vocab_size, pad_id, eos_id = 32768, 0, 1


def base(devices: int, parallel: str = "ddp", **changes):
    data = DataConfig(max_tokens=1024, encoder_tokens=16384, decoder_tokens=11776, packs_per_step=32)
    model = ModelConfig("fat5-base", "t5")
    config = PretrainConfig("x", model=model, data=data, precision="bf16", steps=10_000, parallel=parallel, **changes)
    return config, on_meta(configure_model(config, Info)), PlannedWorld.of("H200", devices)


def speed(devices: int, packs: int = 128, parallel: str = "ddp", **changes) -> float:
    config, model, world = base(devices, parallel, **changes)
    config.data.packs_per_step = packs
    predicted = predict_speed(config, model, world, None, None)
    assert predicted is not None
    assert predicted.hours == pytest.approx(predicted.step_seconds * 10_000 / 3600)
    return predicted.tokens_per_second


@pytest.mark.parametrize(
    ("devices", "parallel", "tokens_per_second"), [(1, "ddp", 429_200), (2, "ddp", 806_600), (2, "fsdp", 775_200)]
)
def test_h200_as_measured(devices: int, parallel: str, tokens_per_second: int) -> None:
    assert speed(devices, 4, parallel) == pytest.approx(tokens_per_second, rel=WITHIN)


def test_a_card_that_was_not_measured_is_guessed_from_one_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    config, model, _ = base(1)

    def of(gpu: str):
        predicted = predict_speed(config, model, PlannedWorld.of(gpu, 1), None, None)
        assert predicted is not None
        return predicted

    guessed = of("H100")
    assert guessed.guess
    assert not of("H200").guess
    # The same peak, and 3,350 GB/s for 4,800.
    assert guessed.single == pytest.approx(429_200 * 3350 / 4800, rel=0.01)
    assert of("A100").single == pytest.approx(429_200 * 312 / 989, rel=0.01)
    monkeypatch.setitem(KNOWN, ("H100", "fat5-small"), (600_000, (32768, 32768, 1024)))
    assert not of("H100").guess, "a model of another size on the same card comes before the same on another card"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "hsdp"])
def test_more_devices_are_faster_and_never_more_than_so_many_times(parallel: str) -> None:
    counts = (1, 16, 32) if parallel == "hsdp" else (1, 2, 4, 8, 16)
    speeds = [speed(devices, parallel=parallel) / devices for devices in counts]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] > 0.5 * speeds[0]


def test_a_divided_model_needs_less_of_each_device() -> None:
    needs = {}
    for parallel, devices in (("ddp", 8), ("fsdp", 2), ("fsdp", 8), ("hsdp", 16)):
        config, model, world = base(devices, parallel)
        plan = plan_memory(config, config.data.batch(), model, world)
        needs[parallel, devices] = plan.weights + plan.gradients + plan.optimizer
    parameters = 305_184_000
    assert needs["ddp", 8] == (4 + 2 + 8 + 8) * parameters
    # float32 weights, gradients and two moments by 8, beside a whole gradient between micro-batches, the embeddings and
    # the output projection in float32 and bfloat16, and two blocks.
    assert needs["fsdp", 8] == pytest.approx((16 / 8 + 4 + 6 * 0.165 + 0.2) * parameters, rel=0.05)
    assert needs["fsdp", 8] == needs["hsdp", 16] < needs["fsdp", 2] < needs["ddp", 8]


def test_a_measured_run_gives_the_speed(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(prepared, tmp_path / "run", steps=12)
    pretrain(config)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    measured, configuration = measured_run(tmp_path / "run")
    assert min(row["tokens_per_second"] for row in rows) <= measured <= max(row["tokens_per_second"] for row in rows)
    assert configuration["data"]["encoder_tokens"] == 256
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    flags = ["--config", str(recipe), "--json_output", "--measured", str(tmp_path / "run")]

    def numbers(*more: str) -> dict:
        assert main(["doctor", *flags, *more]) == 0
        lines = {line["what"]: line for line in json.loads(capsys.readouterr().out)}
        return lines["speed"] | {"memory": lines["memory plan"]["numbers"]}

    same = numbers()
    assert same["numbers"]["tokens_per_second"] == pytest.approx(measured)
    assert same["numbers"]["hours"] * 3600 == pytest.approx(12 * 2 * 384 * 0.97 / measured)
    assert same["numbers"]["source"] == f"measured by {tmp_path / 'run'}"
    assert same["memory"] == same["memory"] | {"devices": 1, "shards": 1, "fits": True}
    wider = numbers("--model.overrides", '{"d_model": 64}')
    assert wider["numbers"]["tokens_per_second"] < 0.8 * measured
    assert "converted by its arithmetic" in wider["numbers"]["source"]
    two = numbers("--gpu", "H100", "--devices", "2", "--parallel", "fsdp", "--precision", "bf16")
    assert two["numbers"]["tokens_per_second"] < 2 * measured
    assert two["memory"]["shards"] == 2
    assert two["memory"]["free"] == pytest.approx(80 * GIB, rel=0.02)


def test_what_cannot_be_predicted_is_said(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny(prepared, tmp_path / "run").to_yaml())
    flags = ["doctor", "--config", str(recipe), "--json_output"]
    assert main([*flags, "--gpu", "A100", "--devices", "2"]) == 0
    lines = {line["what"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines["speed"]["status"] == "warn"
    assert "--measured" in lines["speed"]["advice"]
    assert main([*flags, "--devices", "3"]) == 2  # two packs a step
    lines = {line["what"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines["data"]["status"] == "bad"
    assert main([*flags, "--gpu", "Pentium"]) == 2
    assert "no data sheet of 'Pentium'" in capsys.readouterr().err
    row = dict.fromkeys(ROW_KEYS["train"], 1) | {"kind": "train"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigurationError, match="1 timed steps"):
        measured_run(tmp_path)
