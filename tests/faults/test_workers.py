"""Fault 9: data workers die, alone or with their trainer. None outlives it, and none takes a last save away."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fat5.optim import ScheduleConfig
from fat5.train import verify_checkpoint
from made_run import assert_same_run, command, fork, last_checkpoint, tiny, wait_for_step

SECONDS_TO_DIE = 5.0  # a worker looks once a second
ENDLESS = {"steps": 100_000, "save_every": 100_000, "eval_every": 100_000}

# Messages of a large window fill the pipe, so that a worker waits for a reader while it tries to exit.
ITERATING = """
import os, sys, time
from pathlib import Path
from fat5.data import BatchConfig, MixtureOfDenoisers, PackedLoader, PieceStream, load_tokenizer, open_shards
folder, context = sys.argv[1:]
info = load_tokenizer(f"{folder}/tokenizer").info
batch = BatchConfig(max_tokens=64, encoder_tokens=256, decoder_tokens=128, packs_per_step=1, window=8192)
stream = PieceStream([open_shards(folder)], MixtureOfDenoisers.of("fat5"), info, batch.max_tokens, seed=0)
loader = PackedLoader(stream, batch, num_workers=2, multiprocessing_context=context)
batches = iter(loader)
next(batches)
time.sleep(1)
print("ready", flush=True)
time.sleep(600)
"""


def in_session(leader):
    """Numbers of the processes of a session that run, but for its leader."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == leader and state != "Z" and int(path.parent.name) != leader:
            found.append(int(path.parent.name))
    return found


def survivors(leader):
    """Those of a session that still run after SECONDS_TO_DIE; ends them."""
    deadline = time.monotonic() + SECONDS_TO_DIE
    while in_session(leader) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = in_session(leader)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize("context", ["fork", slow("spawn"), slow("forkserver")])
def test_workers_die_with_a_killed_parent(prepared, context):
    command = [sys.executable, "-c", ITERATING, str(prepared), context]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        assert len(in_session(process.pid)) >= 2
        process.kill()
        process.wait()
        assert survivors(process.pid) == []


def running(prepared, run, **changes):
    """A run with two workers that has made two steps."""
    process = fork(tiny(prepared, run, data={"num_workers": 2}, **(ENDLESS | changes)))
    wait_for_step(run, 2)
    assert len(in_session(process.pid)) == 2
    return process


def test_workers_die_after_a_second_signal(prepared, tmp_path):
    process = running(prepared, tmp_path / "run")
    process.send_signal(signal.SIGSTOP)  # both signals are there before it can save
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert survivors(process.pid) == []
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGUSR1), slow(signal.SIGINT)])
def test_a_signal_to_the_whole_group_saves(prepared, tmp_path, number):
    """What `timeout`, Slurm, systemd and a terminal do: every process gets the signal, the workers too."""
    process = running(prepared, tmp_path / "run")
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error
    step = verify_checkpoint(last_checkpoint(tmp_path / "run"))["step"]
    assert f"stopped by {number.name} after step {step}; the same command continues" in error
    assert survivors(process.pid) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGBUS)])
def test_a_killed_worker_ends_the_run_in_one_line_and_resume_is_exact(prepared, tmp_path, number):
    settings = {"save_every": 1, "eval_every": 50, "schedule": ScheduleConfig(name="constant", warmup_steps=0)}
    process = running(prepared, tmp_path / "run", **settings)
    victim = in_session(process.pid)[0]
    os.kill(victim, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2, error
    assert "Traceback" not in error
    line = error.splitlines()[-1].lstrip("\0")  # torch ends its own word on SIGBUS with a zero byte
    assert line.startswith("fat5 pretrain: data loading stopped: ")
    assert f"(pid {victim}) died with exit code -{number.value}" in line
    assert ("enlarge it" if number == signal.SIGBUS else "Lower data.num_workers if memory ran out") in line
    assert "The same command continues" in line
    assert survivors(process.pid) == []
    at = verify_checkpoint(last_checkpoint(tmp_path / "run"))["step"]
    assert at >= 2
    # Each part in a process of its own, as the command runs: this one has run other tests (lab log, 2026-11-28).
    for name in ("clean", "run"):
        code, error = command(tiny(prepared, tmp_path / name, steps=at + 3, **settings), seconds=100)
        assert code == 0, error
    assert_same_run(tmp_path / "clean", tmp_path / "run")
