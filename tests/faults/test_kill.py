"""Fault 1: SIGKILL at random steps. The run that was killed ends as the run that was not, bit for bit.

All twenty kills, of the real command in real processes:

    pytest -m slow tests/faults/test_kill.py
"""

import random
import signal
import time

import pytest

from fat5.train import pretrain
from made_run import assert_same_run, events, in_child, kill_at_row, start, tiny


@pytest.fixture(scope="module")
def clean(prepared, tmp_path_factory):
    """The run that nothing happens to."""
    run = tmp_path_factory.mktemp("clean") / "run"
    pretrain(tiny(prepared, run))
    return run


@pytest.mark.parametrize("workers", [0, 2])
def test_three_kills(prepared, clean, tmp_path, workers):
    config = tiny(prepared, tmp_path / "run", data={"num_workers": workers})

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
    """SIGKILL after a random time, anywhere: while it starts, steps, evaluates, saves or draws."""
    settings = {"steps": 400, "save_every": 5, "eval_every": 20, "data": {"num_workers": 2}}
    straight = start(tiny(prepared, tmp_path / "clean", **settings))
    began = time.monotonic()
    _, error = straight.communicate(timeout=600)
    assert straight.returncode == 0, error
    whole = time.monotonic() - began
    config = tiny(prepared, tmp_path / "run", **settings)
    generator = random.Random(20)
    kills, finished = 0, 0
    while kills < 20:
        process = start(config)
        try:
            process.wait(timeout=generator.uniform(0.2, 1.2) * whole / 4)
        except Exception:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            finished += 1
            assert process.returncode == 0, process.stderr.read()
            if finished > 40:
                raise AssertionError("the run is too short to be killed twenty times")
    last = start(config)
    _, error = last.communicate(timeout=600)
    assert last.returncode == 0, error
    assert_same_run(tmp_path / "clean", tmp_path / "run")
    print(f"killed {kills} times, resumed {[e['event'] for e in events(tmp_path / 'run')].count('resumed')} times")
