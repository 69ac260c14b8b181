"""Trackers: whatever they do, the run is the same; a continued run goes on in theirs."""

import json
import logging
import os
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fat5.cli.parsing import parse
from fat5.errors import ConfigurationError
from fat5.tasks import PretrainConfig, pretrain
from fat5.train import read_rows
from fat5.train.log import trackers
from fat5.train.log.metrics import TIMES
from fat5.train.log.trackers import RUNS, Trackers, check_trackers, scalars
from made_run import tiny

TRAIN = {"kind": "train", "step": 10, "loss": 2.5, "lr": 1e-3, "grad_norm": None, "mfu": None, "tokens": 9}
EVAL = {"kind": "eval", "step": 10, "loss": 2.0, "accuracy": 0.5, "tokens": 7, "bleu": 30.0, "by_denoiser": {}}
RELEASE = 30.0
"""Seconds after which a hanging fake gives up, so that its thread does not outlive the tests by much."""


class Fake:
    """A library with the functions of wandb and trackio that we call."""

    def __init__(self, at: str = "", fault: str = "raise") -> None:
        self.at, self.fault, self.released = at, fault, threading.Event()
        self.started: list[dict] = []
        self.rows: list[tuple[int, dict]] = []
        self.threads: set[str] = set()
        self.finished = 0

    def init(self, **settings):
        self._act("init")
        self.started.append(settings)
        return SimpleNamespace(log=self.log, finish=self.finish, url="https://host/run")

    def log(self, numbers, step):
        self._act("log")
        self.rows.append((step, numbers))

    def finish(self):
        self._act("finish")
        self.finished += 1

    def _act(self, place):
        self.threads.add(threading.current_thread().name)
        if place == self.at:
            if self.fault == "hang":
                self.released.wait(RELEASE)
            else:
                raise {"raise": ValueError, "interrupt": KeyboardInterrupt}[self.fault]("no\nmore")

    def module(self, name):
        module = ModuleType(name)
        module.begin = self.init
        exec(
            "def init(**settings):\n    print('* news')\n    print('* Warning', 1)\n    return begin(**settings)",
            vars(module),
        )
        return module


@pytest.fixture
def fake(monkeypatch):
    """Puts a fake in the place of a library, and frees what hangs in it after the test."""
    made = []
    for name in trackers.WANDB_DEFAULTS:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")

    def put(name="wandb", at="", fault="raise"):
        made.append(Fake(at, fault))
        monkeypatch.setitem(sys.modules, name, made[-1].module(name))
        return made[-1]

    yield put
    for one in made:
        one.released.set()


@pytest.fixture
def open_trackers(tmp_path):
    """Trackers with what they say and warn of."""
    said, warned = [], []

    def make(*names, every=1):
        made = Trackers(names, tmp_path, 0, {"seed": 1}, every, said.append, warned.append)
        return made, said, warned

    return make


def test_rows_reach_a_tracker(fake, open_trackers, tmp_path):
    library = fake()
    made, said, warned = open_trackers("wandb", every=5)
    for row in ({**EVAL, "step": 0}, {**TRAIN, "step": 9}, TRAIN, EVAL):
        made.write(row)
    made.close()
    curves = {"validation/loss": 2.0, "validation/accuracy": 0.5, "validation/bleu": 30.0}
    assert library.rows == [(0, curves), (10, {"train/loss": 2.5, "train/lr": 1e-3}), (10, curves)]
    assert library.finished == 1
    assert library.threads == {"fat5-wandb"}
    (settings,) = library.started
    assert settings["config"] == {"seed": 1}
    assert settings["name"] == tmp_path.name
    assert os.environ["WANDB_SILENT"] == "true", "it asks for no key"
    assert os.environ["WANDB_CONSOLE"] == "wrap", "the user's own value"
    assert (said, warned) == (["wandb   https://host/run"], [])


def test_parts_have_curves():
    row = {**EVAL, "by_denoiser": {"R": {"loss": 1.0, "accuracy": 0.1, "tokens": 3}}}
    assert scalars(row)["validation by denoiser/R"] == 1.0


def test_no_thread_before_the_workers_are_forked(fake, open_trackers):
    library = fake()
    made, *_ = open_trackers("wandb")
    made.write({**EVAL, "step": 0})
    assert "fat5-wandb" not in {thread.name for thread in threading.enumerate()}
    made.write(TRAIN)
    made.close()
    assert [step for step, _ in library.rows] == [0, 10]


@pytest.mark.parametrize("fault", ["raise", "interrupt"])
def test_raising_at_init(fault, fake, open_trackers):
    library = fake(at="init", fault=fault)
    made, _, warned = open_trackers("wandb")
    for _ in range(20):
        made.write(TRAIN)
        time.sleep(0.01)
    made.close()
    assert library.rows == []
    kind = {"raise": "ValueError", "interrupt": "KeyboardInterrupt"}[fault]
    assert warned == [f"wandb is off: {kind} (no); training goes on"]


@pytest.mark.parametrize("place", ["log", "finish"])
def test_raising_later(place, fake, open_trackers):
    library = fake(at=place)
    made, _, warned = open_trackers("wandb")
    for _ in range(20):
        made.write(TRAIN)
    made.close()
    assert library.finished == (place == "log"), "closed all the same"
    assert warned == ["wandb lost a row: ValueError (no); training goes on"], "once"


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_hanging(place, fake, open_trackers, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(trackers, "MOST_ROWS", 10)
    fake(at=place, fault="hang")
    other = fake("trackio")
    made, _, warned = open_trackers("wandb", "trackio")
    began = time.monotonic()
    for _ in range(11):
        made.write(TRAIN)
        time.sleep(0.02)
    for _ in range(20 if place != "finish" else 0):
        made.feeds[0].write(10, {})
    wrote = time.monotonic()
    made.close()
    assert wrote - began < 5, "a write never waits"
    assert 0.4 < time.monotonic() - wrote < 5
    late = "wandb did not end in time: its last rows may be missing; metrics.jsonl has all"
    slow = "wandb does not keep up: rows are lost to it; metrics.jsonl has all"
    assert warned == ([late] if place == "finish" else [slow, late])
    assert len(other.rows) == 11, "another tracker goes on"
    assert other.finished == 1


def test_a_missing_library_is_refused(monkeypatch):
    for name in ("wandb", "trackio", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
        command = f"fat5[{name}]" if name != "tensorboard" else name
        with pytest.raises(ConfigurationError) as error:
            check_trackers([name])
        assert str(error.value).startswith(f"report_to names {name}, and the {name} package is not installed. pip")
        assert command in str(error.value)


def test_a_run_without_the_library_never_begins(prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigurationError, match=r"fat5\[trackio\]"):
        pretrain(tiny(prepared, tmp_path / "run", report_to=["trackio"]))
    assert not (tmp_path / "run").exists()


def test_unknown_trackers_are_refused(prepared, tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"report_to names 'mlflow'\. Choose among tensorboard, wandb, trackio"
    ):
        tiny(prepared, tmp_path, report_to=["mlflow"]).resolved()
    both = tiny(prepared, tmp_path, tensorboard=True, report_to=["wandb", "tensorboard", "wandb"])
    assert both.trackers() == ["tensorboard", "wandb"]


def test_a_continued_run_goes_on_in_its_tracker(prepared, tmp_path, fake, capsys, monkeypatch):
    """And an evaluation, a row a step, the configuration and a clean standard output."""
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 60.0)  # on busy cores a thread may begin late
    libraries = [fake("wandb"), fake("trackio")]
    changes = {"report_to": ["wandb", "trackio", "tensorboard"], "log_every": 2}
    pretrain(tiny(prepared, tmp_path / "run", **changes, steps=4))
    pretrain(tiny(prepared, tmp_path / "run", **changes))
    ids = json.loads((tmp_path / "run" / RUNS).read_text())
    for library, key in zip(libraries, ("id", "name"), strict=True):
        first, second = library.started
        assert first[key] == second[key]
        assert first[key].endswith(ids["wandb" if key == "id" else "trackio"])
        assert first["resume"] == "allow"
        assert second["config"]["steps"] == 8
        steps = [step for step, numbers in library.rows if "train/loss" in numbers]
        assert steps == [2, 4, 6, 8]
        assert [step for step, numbers in library.rows if "validation/loss" in numbers] == [0, 4, 8]
        assert library.finished == 2
    rows = {row["step"]: row["loss"] for row in read_rows(tmp_path / "run/metrics.jsonl") if row["kind"] == "train"}
    assert {step: numbers["train/loss"] for step, numbers in libraries[0].rows if "train/loss" in numbers} == {
        step: rows[step] for step in (2, 4, 6, 8)
    }
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]
    captured = capsys.readouterr()
    assert "https://host/run" in captured.err
    assert captured.out.count("* news") == captured.out.count("* Warning") == 2, "wandb alone, which has a setting"
    assert captured.err.count("* news") == 0
    assert captured.err.count("* Warning 1\n") == 2


def test_a_run_is_the_same_with_a_broken_tracker(prepared, tmp_path, fake, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    caplog.set_level(logging.ERROR)
    pretrain(tiny(prepared, tmp_path / "plain"))
    fake(at="log", fault="hang")
    pretrain(tiny(prepared, tmp_path / "run", report_to=["wandb"]))
    plain, tracked = (
        [{key: value for key, value in row.items() if key not in TIMES} for row in read_rows(folder / "metrics.jsonl")]
        for folder in (tmp_path / "plain", tmp_path / "run")
    )
    assert tracked == plain
    events = (tmp_path / "run/events.jsonl").read_text()
    assert "wandb did not end in time" in events


def test_names_on_the_command_line():
    for words in (
        ["--report_to", "wandb,trackio"],
        ["--report_to", "wandb", "trackio"],
        ["--report_to=[wandb,trackio]"],
    ):
        assert parse(PretrainConfig, [*words, "--output_dir", "x"], "pretrain")["report_to"] == ["wandb", "trackio"]


@pytest.mark.parametrize("content", ["{", '{"wandb": "../x"}', '{"wandb": 3}'])
def test_damaged_ids(content, fake, open_trackers, tmp_path):
    (tmp_path / RUNS).write_text(content)
    library = fake()
    made, _, warned = open_trackers("wandb")
    made.close()
    assert len(library.started[0]["id"]) == 8
    assert json.loads((tmp_path / RUNS).read_text())["wandb"] == library.started[0]["id"]
    assert len(warned) == (content == "{")
