"""Fault 1: SIGKILL at random steps. The run that was killed ends as the run that was not, bit for bit.

All twenty kills, of the real command in real processes:

    pytest -m slow tests/faults/test_kill.py
"""

import random
import signal
import time

import pytest

from fat5.tasks import pretrain
from made_run import assert_same_run, events, in_child, kill_at_row, rows_without_times, start, tiny, wait_for_step

DROPOUT = {"attention_dropout_rate": 0.1}


@pytest.fixture(scope="module")
def clean(prepared, tmp_path_factory):
    """The run that nothing happens to."""
    run = tmp_path_factory.mktemp("clean") / "run"
    pretrain(tiny(prepared, run, overrides=DROPOUT))
    return run


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_three_kills(prepared, clean, tmp_path, workers):
    config = tiny(prepared, tmp_path / "run", overrides=DROPOUT, data={"num_workers": workers})

    def killed_after(rows):
        def work():
            kill_at_row(rows)()
            pretrain(config)

        return work

    # Before the first checkpoint, in the middle, and two rows into what is left.
    for rows in (2, 6, 2):
        assert in_child(killed_after(rows)) == -signal.SIGKILL
    pretrain(config)
    assert_same_run(clean, tmp_path / "run")
    assert [event["event"] for event in events(tmp_path / "run")].count("resumed") >= 2


@pytest.mark.slow
def test_twenty_kills_of_the_command(prepared, tmp_path):
    """SIGKILL at twenty random steps and moments, between which the run gets on by seven steps on average."""
    settings = {"overrides": DROPOUT, "steps": 300, "save_every": 5, "eval_every": 20, "data": {"num_workers": 2}}
    straight = start(tiny(prepared, tmp_path / "clean", **settings))
    _, error = straight.communicate(timeout=900)
    assert straight.returncode == 0, error
    run = tmp_path / "run"
    config = tiny(prepared, run, **settings)
    generator = random.Random(20)
    for _ in range(20):
        done = max((row["step"] for row in rows_without_times(run)), default=0) if run.exists() else 0
        process = start(config)
        wait_for_step(run, done + generator.randint(1, 13))
        time.sleep(generator.uniform(0.0, 0.2))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    last = start(config)
    _, error = last.communicate(timeout=900)
    assert last.returncode == 0, error
    assert_same_run(tmp_path / "clean", run)
    print("resumed from", [event["checkpoint"] for event in events(run) if event["event"] == "resumed"])
