"""Runs of two processes on the CPU: started by torchrun, as a user does, or forked with torchrun's environment."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

INJECTED = Path(__file__).parent / "injected.py"


def torchrun(*words: str, fault: dict | None = None, processes: int = 2, options: tuple[str, ...] = ()):
    """Starts `fat5 WORDS` under torchrun; with `fault`, each rank injects it (injected.py)."""
    entry = ["-m", "fat5"] if fault is None else [str(INJECTED)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "INJECT": json.dumps(fault)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *launcher, *entry, *words], env=environment, **pipes)


def finish(process: subprocess.Popen, seconds: float = 240.0) -> tuple[int, str, str]:
    """Exit code, output and errors of a process that ends by itself."""
    try:
        output, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, output, error


def forked(work: Callable[[], object], processes: int = 2, seconds: int = 120) -> list[int]:
    """Runs `work` in forked ranks: no launcher ends one when another has died.

    Returns:
        Exit codes by rank: 0, 1 for an exception, or minus the signal's number, SIGALRM's after `seconds`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ.update({name: str(number) for name, number in places.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            _in_rank(work, seconds)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def _in_rank(work: Callable[[], object], seconds: int) -> None:
    try:
        signal.alarm(seconds)
        work()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def rank() -> int:
    return int(os.environ["RANK"])


def noting(folder: Path, work: Callable[[], object]) -> None:
    """Runs `work` in a rank that notes in `folder`: by step its piece ids and a hash of its weights; and their size."""
    from fat5.train.step import StepRunner

    step_of = StepRunner.run
    noted: dict[str, Any] = {"pieces": [], "weights": []}

    def run(self, batches, rate):
        result = step_of(self, batches, rate)
        noted["pieces"].append([int(one) for batch in batches for one in batch.piece[: batch.num_examples]])
        content = b"".join(weight.detach().numpy().tobytes() for weight in self.weights)
        noted["weights"].append(hashlib.sha256(content).hexdigest())
        noted["held"] = sum(weight.numel() for weight in self.weights)
        return result

    StepRunner.run = run  # type: ignore[method-assign]
    work()
    (folder / f"rank-{rank()}.json").write_text(json.dumps(noted))


def watched(folder: Path, processes: int = 2) -> list[dict]:
    """What each rank noted."""
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(processes)]


def pid_of_rank(launcher: int, number: int, seconds: float = 60.0) -> int:
    """The process of a rank, among the children of torchrun."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            try:
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"RANK={number}".encode() in environment:
                return int(child)
        time.sleep(0.05)
    raise AssertionError(f"torchrun started no rank {number}")


def stop_at(step: int, work: Callable[[], object]) -> None:
    """Runs `work`, a run of this process or of several, up to a step: a signal to the first process stops it there."""
    from fat5.train import RunStopped
    from fat5.train.step import StepRunner

    step_of, made = StepRunner.run, []

    def run(self, batches, rate):
        made.append(1)
        if len(made) == step and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(self, batches, rate)

    StepRunner.run = run  # type: ignore[method-assign]
    try:
        work()
    except RunStopped:
        return
    finally:
        StepRunner.run = step_of  # type: ignore[method-assign]
    raise AssertionError(f"the run was not stopped at step {step}")
