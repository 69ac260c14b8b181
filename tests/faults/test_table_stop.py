"""Rows 1 to 4, 9, 10 and 17 of the fault table (docs/reliability.md), injected into the command as a user starts it."""

import errno
import os
import random
import resource
import signal
import subprocess
import time

import pytest
import torch

from fat5.files import is_leftover
from fat5.train import verify_checkpoint
from fat5.train.signals import ECHO
from made_ranks import finish, pid_of_rank, torchrun
from made_run import (
    assert_same_run,
    command,
    events,
    fork,
    last_checkpoint,
    rows_without_times,
    start,
    tiny,
    wait_for_step,
)

ENDLESS = {"steps": 100_000, "save_every": 100_000, "eval_every": 100_000}
SECONDS_TO_LEAVE = 60.0  # a step and a save take well under one; the rest is a busy machine


def slow(*values, **settings):
    return pytest.param(*values, marks=pytest.mark.slow, **settings)


# 1. SIGKILL at a random step; twenty of them are in test_kill.py.


def test_a_killed_run_ends_as_the_undisturbed_one(prepared, undisturbed, tmp_path):
    config = tiny(prepared, tmp_path / "run", keep_last=4)
    code, _ = command(config, fault={"kill": {"rows": random.Random(1).randint(4, 9)}})
    assert code == -signal.SIGKILL
    code, error = command(config)
    assert code == 0, error
    assert "the newest that verifies" in error
    assert_same_run(undisturbed, tmp_path / "run")


# 2. SIGKILL at each point inside a save.

POINTS = [
    *(slow(f"before {name}") for name in ("model.safetensors", "optimizer.safetensors", "trainer.json")),
    *(slow(f"before fsync of {name}") for name in ("model.safetensors", "optimizer.safetensors", "trainer.json")),
    slow("before manifest"),
    "before rename",
    slow("after rename"),
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_inside_a_save(prepared, undisturbed, tmp_path, point):
    config = tiny(prepared, tmp_path / "run", keep_last=4)
    code, _ = command(config, fault={"kill_in_save": {"point": point, "passes": 3}})
    assert code == -signal.SIGKILL
    assert last_checkpoint(tmp_path / "run").name == ("step-6" if point == "after rename" else "step-4")
    code, error = command(config)
    assert code == 0, error
    assert_same_run(undisturbed, tmp_path / "run")
    assert not leftovers(tmp_path / "run")


def test_killed_while_a_checkpoint_takes_the_place_of_its_older_self(prepared, undisturbed, tmp_path):
    """A run that a signal stopped at its evaluation saves that step again; both renames are needed for that."""
    run = tmp_path / "run"
    config = tiny(prepared, run, keep_last=4)
    code, error = command(config, fault={"stop_in_evaluation": {"step": 4}})
    assert code == 128 + signal.SIGTERM, error
    assert last_checkpoint(run).name == "step-4"
    code, _ = command(config, fault={"kill_in_save": {"point": "between renames"}})
    assert code == -signal.SIGKILL
    assert not (run / "checkpoints" / "step-4").exists()
    code, error = command(config)
    assert code == 0, error
    assert "step-4 (the newest that verifies)" in error
    assert_same_run(undisturbed, run)


def leftovers(run):
    folders = [run, run / "checkpoints"] if (run / "checkpoints").exists() else [run]
    return [name for folder in folders for name in os.listdir(folder) if is_leftover(name)]


# 3. SIGTERM, SIGUSR1, Ctrl-C.


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGUSR1), slow(signal.SIGINT)])
def test_a_signal_saves_and_leaves(prepared, tmp_path, number):
    run = tmp_path / "run"
    process = fork(tiny(prepared, run, data={"num_workers": 1}, **ENDLESS))
    wait_for_step(run, 2)
    process.send_signal(number)
    began = time.monotonic()
    _, error = process.communicate(timeout=120)
    assert time.monotonic() - began < SECONDS_TO_LEAVE
    assert process.returncode == 128 + number
    step = verify_checkpoint(last_checkpoint(run))["step"]
    assert f"stopped by {number.name} after step {step}; the same command continues" in error
    assert step == rows_without_times(run)[-1]["step"]
    assert "Traceback" not in error


def test_the_same_signal_twice_at_once_is_one(prepared, tmp_path):
    """`timeout` sends SIGTERM to the process, and then to the whole group: the run saves all the same."""
    run = tmp_path / "run"
    process = fork(tiny(prepared, run, **ENDLESS))
    wait_for_step(run, 2)
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
        time.sleep(ECHO / 50)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in error
    assert verify_checkpoint(last_checkpoint(run))["step"] >= 2


@pytest.mark.slow
def test_under_the_command_timeout(prepared, tmp_path):
    """With workers, whose group it signals too."""
    run = tmp_path / "run"
    process = start(tiny(prepared, run, data={"num_workers": 2}, **ENDLESS), before=["timeout", "1000"])
    wait_for_step(run, 2)
    process.send_signal(signal.SIGTERM)  # it does as at the end of its time
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, "what the command left with"
    assert "stopped by SIGTERM after step" in error
    assert verify_checkpoint(last_checkpoint(run))["step"] == rows_without_times(run)[-1]["step"]


@pytest.mark.slow
def test_a_signal_at_any_moment_of_a_run(prepared, undisturbed, tmp_path):
    """From the start of the process to its end: it saves and says so, or has not begun (or is done) and leaves nothing
    incomplete. The same command ends the run in any case.
    """
    generator, seen = random.Random(3), []
    begun = time.monotonic()
    start(tiny(prepared, tmp_path / "timed", keep_last=4)).communicate(timeout=120)
    whole = time.monotonic() - begun  # most of it imports, on which a slow machine spends more than ten seconds
    for turn in range(12):
        run = tmp_path / f"run-{turn}"
        config = tiny(prepared, run, keep_last=4)
        code, error = signalled(config, generator.uniform(0.0, 1.1 * whole))
        seen.append(code)
        assert code in (0, -signal.SIGTERM, 128 + signal.SIGTERM), error
        assert "Traceback" not in error
        if code == 128 + signal.SIGTERM:
            step = verify_checkpoint(last_checkpoint(run))["step"]
            assert f"stopped by SIGTERM after step {step}" in error
        code, error = command(config)
        assert code == 0, error
        assert_same_run(undisturbed, run)
        assert not leftovers(run)
    assert len(set(seen)) > 1, f"all the same: {seen}"


def signalled(config, seconds: float) -> tuple[int, str]:
    """Exit code and errors of a run that gets SIGTERM so many seconds after the start of its process."""
    process = start(config)
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    return process.returncode, error


# 4. The disk is full, failing or read-only.


@pytest.mark.parametrize("code", [errno.ENOSPC, slow(errno.EIO), slow(errno.EROFS)], ids=errno.errorcode.get)
def test_a_failing_disk(prepared, undisturbed, tmp_path, code):
    config = tiny(prepared, tmp_path / "run", keep_last=4)
    done, error = command(config, fault={"disk": {"saves": [2, 3], "code": code}})
    assert done == 0, error
    assert error.count(f"CHECKPOINT NOT SAVED: {tmp_path}/run/checkpoints: {os.strerror(code)}") == 2
    assert_same_run(undisturbed, tmp_path / "run")


def test_a_disk_that_fails_for_good(prepared, tmp_path):
    config = tiny(prepared, tmp_path / "run", steps=30)
    code, error = command(config, fault={"disk": {"saves": list(range(2, 100)), "code": errno.ENOSPC}})
    assert code == 2
    assert "5 saves in a row failed (No space left on device)" in error.splitlines()[-1]
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert verify_checkpoint(tmp_path / "run" / "checkpoints" / "step-2")["step"] == 2


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_that_comes_and_goes(prepared, tmp_path):
    """A real error of the system, from outside: saves fail while it lasts, and the run leaves with its state saved."""
    run = tmp_path / "run"
    process = fork(tiny(prepared, run, **ENDLESS | {"save_every": 20}))
    wait_for_step(run, 2)
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, before[1]))
    wait_for_step(run, 45)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "CHECKPOINT NOT SAVED" in error
    assert verify_checkpoint(last_checkpoint(run))["step"] == rows_without_times(run)[-1]["step"]


# 9. A data worker dies (test_workers.py) or hangs.


@pytest.mark.slow
def test_a_data_worker_that_hangs(prepared, tmp_path):
    """SIGSTOP to it: given up after the timeout, with the piece that was awaited, and nobody is left."""
    run, data = tmp_path / "run", {"num_workers": 1}
    process = fork(tiny(prepared, run, data=data, **ENDLESS), fault={"patience": {"worker": 4.0}})
    wait_for_step(run, 2)
    (worker,) = workers(process.pid)
    os.kill(worker, signal.SIGSTOP)
    began = time.monotonic()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2
    assert time.monotonic() - began < SECONDS_TO_LEAVE
    line = error.splitlines()[-1]
    assert "data loading stopped: no worker answered for 4 s; awaited was micro-batch" in line
    assert "which starts with piece" in line
    assert not os.path.exists(f"/proc/{worker}")


def workers(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


# 10. A rank hangs; one that dies is in test_ranks.py and in tests/train/test_many_devices.py.


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="waits for torch.distributed")
def test_a_rank_that_hangs(prepared, tmp_path):
    """The other gives up after its patience, and torchrun ends the one that hangs within its 30 seconds."""
    run = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(tiny(prepared, run, **ENDLESS).to_yaml())
    process = torchrun("pretrain", "--config", str(tmp_path / "run.yaml"), fault={"patience": {"rank": 5.0}})
    wait_for_step(run, 2)
    pids = [pid_of_rank(process.pid, rank) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    code, _, error = finish(process, 90)
    assert code != 0
    assert time.monotonic() - began < 60
    assert "another process of this run has ended, or has not answered in time" in error
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


# 17. The same folder twice.


def test_two_commands_at_the_same_moment(prepared, tmp_path):
    """One trains, the other one leaves and names it; once it is killed, the next takes the folder over."""
    run = tmp_path / "run"
    config = tiny(prepared, run, **ENDLESS)
    both = [fork(config), fork(config)]
    deadline = time.monotonic() + 60
    while all(process.poll() is None for process in both) and time.monotonic() < deadline:
        time.sleep(0.05)
    second, trains = sorted(both, key=lambda process: process.poll() is None)
    _, error = second.communicate()
    assert second.returncode == 2
    wait_for_step(run, 2)
    assert trains.poll() is None
    assert f"in use by process {trains.pid} on {os.uname().nodename}" in error
    trains.kill()
    trains.communicate()
    assert (run / "run.lock").exists()
    code, error = command(tiny(prepared, run, steps=2))
    assert code == 0, error
    assert [event["event"] for event in events(run)].count("started") == 2
