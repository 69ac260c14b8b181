"""A damaged line in metrics.jsonl costs that line alone: it is put aside and named, and every other row stays."""

import json

import pytest

from fat5.errors import DataError
from fat5.tasks import pretrain
from fat5.train import draw_comparison, draw_run, read_rows
from fat5.train.log.metrics import MetricsLog
from made_run import events, rows_without_times, tiny

TRAIN = {"kind": "train", "step": 3, "loss": 5.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 9, "seconds": 2.0}
TRAIN |= {"tokens_per_second": 4.5}
EVAL = {"kind": "eval", "step": 3, "loss": 5.0, "accuracy": 0.1, "by_denoiser": {"[S]": {"loss": 5.0}}}
DAMAGES = {
    "byte": b'{"kind": "train", \xff',
    "nested": b"[" * 100_000,
    "null": b"null",
    "no kind": b'{"step": 3}',
    **{f"step {value}": json.dumps(TRAIN | {"step": value}).encode() for value in ("3", 2.5, True, None, -1, 10**30)},
    **{
        f"{key} {value}"[:20]: json.dumps(TRAIN | {key: value}).encode()
        for key, value in {"loss": "x", "lr": None, "seconds": [], "tokens": 10**400}.items()
    },
    **{
        f"by_denoiser {value}": json.dumps(EVAL | {"by_denoiser": value}).encode()
        for value in (None, [], {"[S]": 5.0}, {"[S]": {}}, {"[S]": {"loss": "x"}})
    },
}


@pytest.fixture(scope="module")
def stopped(prepared, tmp_path_factory):
    """A run of six steps, the last checkpoint of which is that of step 6, and what it wrote to its log."""
    run = tmp_path_factory.mktemp("log") / "run"
    pretrain(tiny(prepared, run, steps=6))
    return run


def damaged(stopped, tmp_path, damage, line=4):
    """A copy of the run whose log has one more line, in its middle; returns the copy."""
    import shutil

    shutil.copytree(stopped, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines.insert(line - 1, damage + b"\n")
    log.write_bytes(b"".join(lines))
    return tmp_path / "run"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_the_other_rows_stay_and_the_line_is_put_aside(stopped, tmp_path, damage):
    run = damaged(stopped, tmp_path, damage)
    log = MetricsLog(run / "metrics.jsonl")
    assert log.rewind(6, run / "discarded.jsonl") == [4]
    assert log.path.read_bytes() == (stopped / "metrics.jsonl").read_bytes()
    assert (run / "discarded.jsonl").read_bytes() == damage + b"\n"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_plots_draw_the_other_rows_and_name_the_line(stopped, tmp_path, damage, caplog, monkeypatch):
    if damage != DAMAGES["byte"]:  # what is drawn is made up by then, and one picture shows that it can be written
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *arguments, **settings: None)
    run = damaged(stopped, tmp_path, damage)
    assert read_rows(run / "metrics.jsonl") == read_rows(stopped / "metrics.jsonl")
    draw_run(run / "metrics.jsonl", tmp_path / "one.png")
    draw_comparison([run], tmp_path / "two.png")
    said = f"{run / 'metrics.jsonl'}: line 4 is not a row of a run"
    assert [record.getMessage() for record in caplog.records] == [said] * 3


def test_the_run_goes_on_and_tells_of_it(prepared, stopped, tmp_path, capfd):
    run = damaged(stopped, tmp_path, DAMAGES["byte"])
    pretrain(tiny(prepared, run, steps=8))
    assert "warning: metrics.jsonl: line 4 is not a row of a run; moved to discarded.jsonl" in capfd.readouterr().err
    assert [row["step"] for row in rows_without_times(run) if row["kind"] == "train"] == list(range(1, 9))
    assert "moved to discarded.jsonl" in next(event["line"] for event in events(run) if event["event"] == "warning")


def test_rows_after_the_checkpoint_are_kept_aside(prepared, stopped, tmp_path):
    """Killed before the next save: the run does these steps again, and what it said of them is still there."""
    run = damaged(stopped, tmp_path, b"")
    lost = json.dumps(TRAIN | {"step": 7}).encode()
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(lost)  # the last byte, a line break, is not on the disk
    assert MetricsLog(run / "metrics.jsonl").rewind(6, run / "discarded.jsonl") == [4]
    assert (run / "discarded.jsonl").read_bytes() == b"\n" + lost + b"\n"


def test_a_log_without_a_row_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not a JSON object"):
        read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl"])
def test_an_incomplete_last_line_does_not_swallow_the_next(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"event": "sta')
    MetricsLog(tmp_path / name).write({"event": "resumed"})
    assert (tmp_path / name).read_bytes() == b'{"event": "sta\n{"event": "resumed"}\n'
