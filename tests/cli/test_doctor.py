"""`fat5 doctor`: the machine, a recipe that works, and one whose data is not there."""

import json

import pytest

from fat5.cli.main import main


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
        (["bench", "kernels", "--static", "--workers", "-1"], "workers -1 is negative"),
    ],
)
def test_numbers_that_cannot_be(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert says in capsys.readouterr().err
