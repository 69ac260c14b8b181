"""`fat5 doctor`: the machine, a recipe that works, and one whose data is not there."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from fat5.cli.main import main
from fat5.tasks import PretrainConfig
from fat5.tasks.forecast import Choice, PlannedWorld, weigh_budget

PAGE = Path(__file__).parents[2] / "docs/doctor.md"


def report(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    code = main(["doctor", "--json_output", "true", *argv])
    return code, {line["what"]: line for line in json.loads(capsys.readouterr().out)}


def test_the_machine_is_fit(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = report([], capsys)
    assert code == 0
    assert lines["torch"]["status"] == "ok"
    assert "fr/base" in lines["recipes"]["found"]
    assert "slurm.sh" in lines["launch files"]["found"]
    assert "memory plan" not in lines


def test_a_recipe_without_its_data_is_bad_and_still_counted(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = report(["--config", "fr/base", "--data.sources", '[{"path": "nowhere"}]'], capsys)
    assert code == 2
    assert lines["data"]["status"] == "bad"
    assert "nowhere" in lines["data"]["found"]
    assert "305,184,000" in lines["model"]["found"]
    assert "GiB" in lines["memory plan"]["found"]


def test_a_plan_beyond_the_memory_is_bad(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.encoder_tokens", str(1 << 24), "--data.decoder_tokens", str(1 << 24)]
    code, lines = report(["--config", "fr/large", "--gradient_checkpointing", "false", *flags], capsys)
    assert code == 2
    assert lines["memory plan"]["status"] == "bad"
    assert "encoder_tokens" in lines["memory plan"]["found"]


def test_duration_follows_from_the_speed(capsys: pytest.CaptureFixture[str]) -> None:
    _, lines = report(["--config", "demo", "--steps", "2000", "--tokens_per_second", "3584"], capsys)
    assert lines["speed"]["found"] == "0.3 hours at 3,584 tokens/s (assumed)"


def test_the_table_shows_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--config", "demo", "--data.sources", '[{"path": "x"}]']) == 2
    out = capsys.readouterr().out
    assert "C compiler" in out
    assert "memory plan" in out


def test_shapes_that_cannot_be_have_no_plan(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.max_tokens", "0", "--data.sources", '[{"path": "x"}]']
    code, lines = report(["--config", "demo", *flags], capsys)
    assert code == 2
    assert lines["data"]["status"] == "bad"
    assert "memory plan" not in lines


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["doctor", "--tokens_per_second", "-1"], "tokens_per_second: -1.0 is not above 0"),
        (["doctor", "--budget", "a day"], "budget: 'a day' is no number of hours. Give hours of GPUs"),
        (["doctor", "--budget", "0h"], "budget: '0h' is no number of hours"),
        (["doctor", "--budget", "9h", "--tokens_per_second", "9"], "tokens_per_second: is the speed of one model"),
        (["bench", "kernels", "--static", "--workers", "-1"], "workers -1 is negative"),
    ],
)
def test_numbers_that_cannot_be(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert says in capsys.readouterr().err


@cache
def weigh(hours: float, gpu: str = "H200", devices: int = 1) -> list[Choice]:
    config = PretrainConfig(precision="bf16")
    return weigh_budget(config, PlannedWorld.of(gpu, devices), hours, 32768, None, None)


def advised(choices: list[Choice]) -> Choice:
    return next((one for one in reversed(choices) if one.suits), choices[0])


def test_the_table_of_budgets_is_what_is_computed() -> None:
    made = []
    for hours in (1, 4, 24, 100, 1000):
        choices = weigh(hours)
        best = advised(choices)
        cells = [f"{one.tokens / 1e9:,.1f}B, {one.ratio:,.1f}" for one in choices]
        cells[choices.index(best)] = f"**{cells[choices.index(best)]}**"
        made.append(f"| {hours:,} | {' | '.join(cells)} | {best.optimal / 1e6:,.0f}M |")
    page = PAGE.read_text(encoding="utf-8")
    table = page.partition("<!-- budget:begin")[2].partition("<!-- budget:end")[0].strip().splitlines()
    assert table[3:] == made


def test_tokens_follow_from_hours_and_speed() -> None:
    small = weigh(1)[0]
    # 737,420 useful tokens/s in packs of full-length documents; an example of 500 tokens is 536 on both sides.
    assert small.tokens == pytest.approx(737_420 * 3600 * 500 / 536, rel=0.1)
    assert small.ratio == pytest.approx(small.tokens / 146_832_896)
    assert small.optimal == pytest.approx((small.tokens * small.parameters / 20) ** 0.5)
    assert weigh(2)[0].tokens == pytest.approx(2 * small.tokens, rel=0.001)
    shared = weigh(8, devices=8)[0]
    assert 0.5 * 8 * small.tokens < shared.tokens < 8 * small.tokens


def test_more_hours_advise_a_larger_model() -> None:
    assert [advised(weigh(hours)).preset for hours in (1, 24, 100)] == ["fat5-small", "fat5-base", "fat5-large"]
    assert not advised(weigh(1)).suits
    assert weigh(24, "T4")[-1].fits is False


def test_the_advice_names_model_steps_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = report(["--budget", "1d", "--gpu", "H200"], capsys)
    assert code == 0
    assert lines["budget"]["status"] == "ok"
    assert lines["budget"]["found"].startswith(
        "24 hours of H200: fat5-base for 169,698 steps, on 34.5B tokens (4 passes"
    )
    assert lines["fat5-large"]["status"] == "warn"
    _, guessed = report(["--budget", "1d", "--gpu", "H100"], capsys)
    assert guessed["budget"]["status"] == "warn"
    assert "a guess" in guessed["budget"]["found"]
    assert "--measured" in guessed["budget"]["advice"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="waits for a machine without a GPU")
def test_a_budget_on_a_device_of_unknown_speed(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = report(["--budget", "90m"], capsys)
    assert code == 0
    assert lines["budget"]["status"] == "warn"
    assert lines["budget"]["found"] == "the speed of this CPU is not known"
    flags = ["--budget", "90m", "--tokens_per_second", "9140", "--model.preset", "fat5-demo"]
    _, lines = report(flags, capsys)
    assert lines["fat5-demo"]["numbers"]["tokens"] == pytest.approx(9140 * 5400 * 500 / 536, rel=0.05)
    assert lines["budget"]["status"] == "warn", "too little for 25M parameters"
