"""`fat5` in a process of its own, with faults in it.

    INJECT='{"numbers": {"step": 5, "rank": 1}}' python tests/injected.py pretrain --config FILE

INJECT is a JSON object: fault → settings. Each fault is a function below; its parameters are the settings.
"""

import atexit
import contextlib
import json
import math
import multiprocessing.util
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import TextIO

from numba.core.registry import cpu_target

from fat5.cli import pretrain as command_that_is_forked
from fat5.cli.main import main
from fat5.data.examples import loader
from fat5.tasks import pretraining
from fat5.train import run, trainer, world
from fat5.train.checkpoint import files, store
from fat5.train.log.metrics import MetricsLog
from fat5.train.step import StepRunner

assert command_that_is_forked  # imported once for all

current = {"step": 0}
"""The step that is being made, counted from 1."""


def kill(rows: int) -> None:
    """SIGKILL once so many rows are in the log."""
    write, written = MetricsLog.write, []

    def deadly(self, row):
        write(self, row)
        if self.path.name == "metrics.jsonl":
            written.append(row)
            if len(written) == rows:
                os.kill(os.getpid(), signal.SIGKILL)

    MetricsLog.write = deadly


def kill_in_save(point: str, passes: int = 1) -> None:
    """SIGKILL at a named point of a save, when it is passed for the given time.

    "between renames" is where a checkpoint takes the place of another one of the same step.
    """
    seen = []

    def reached(name):
        seen.extend([name] * (name == point))
        if len(seen) == passes:
            os.kill(os.getpid(), signal.SIGKILL)

    rename = Path.rename

    def renamed(self, target):
        if self.name.startswith(".writing-step-") and (self.parent / self.name.replace("writing", "removing")).exists():
            reached("between renames")
        return rename(self, target)

    files.reached, Path.rename = reached, renamed


def stop_in_evaluation(step: int) -> None:
    """SIGTERM to itself as the evaluation of a step begins."""
    evaluate = trainer.Trainer._evaluate_if_due

    def signalled(self):
        if self.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self)

    trainer.Trainer._evaluate_if_due = signalled


def disk(saves: list[int], code: int) -> None:
    """The saves of these numbers, from 1, meet an error of the disk in the middle of a file; no pause follows."""
    write, save_file, number = store.write_checkpoint, files.save_file, []

    def full(content, path, metadata):
        path.write_bytes(b"part of a file")
        raise OSError(code, os.strerror(code))

    def scarce(*arguments):
        number.append(1)
        files.save_file = full if len(number) in saves else save_file
        write(*arguments)

    store.write_checkpoint = scarce
    store.RETRY_SECONDS = store.LEAVING_SECONDS = 0.0


def log_disk(code: int) -> None:
    """metrics.jsonl cannot be written."""

    def scarce(file, mode="r", *arguments, **settings):
        if str(file).endswith("metrics.jsonl") and "a" in mode:
            raise OSError(code, os.strerror(code))
        return open(file, mode, *arguments, **settings)

    sys.modules[MetricsLog.__module__].open = scarce


def numbers(step: int, rank: int = 0, what: str = "loss", factor: float = math.nan) -> None:
    """Loss or gradient of a step of one rank times a factor."""
    backward = StepRunner._forward_backward

    def spoiled(self, batch, count):
        loss = backward(self, batch, count)
        if current["step"] == step and self.world.rank == rank:
            if what == "loss":
                return loss * factor
            self.weights[3].grad *= factor
        return loss

    StepRunner._forward_backward = spoiled


def memory(step: int, megabytes: int) -> None:
    """From a step on, the process may have so much more memory than it uses."""
    make, held = trainer.Trainer._step, []

    def bounded(self):
        if self.state.step + 1 == step:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
            # Its heap may have free blocks, of imports and earlier steps: they are taken first.
            with contextlib.suppress(MemoryError):
                while True:
                    held.append(bytearray(1 << 18))
            del held[-4 * megabytes :]
        make(self)

    trainer.Trainer._step = bounded


def gpu_memory(megabytes: int) -> None:
    """PyTorch may take so much of the GPU's memory."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((megabytes << 20) / total)


def measure(target: str) -> None:
    """Leaves in a file the bytes of the memory plan, and those that the process took at most since it was made."""

    def kilobytes(name):
        return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name))

    def noted(plan, free):
        before = kilobytes("VmRSS")
        atexit.register(lambda: Path(target).write_text(f"{plan.total} {(kilobytes('VmHWM') - before) * 1024}"))
        return check(plan, free)

    check, pretraining.check_memory = pretraining.check_memory, noted


def patience(worker: float = 300.0, rank: float = 600.0) -> None:
    """Seconds until a silent data worker, or a silent rank, is given up."""
    loader.Loader.__init__.__kwdefaults__["timeout"] = worker
    world.SILENCE = world.timedelta(seconds=rank)


def _count_steps() -> None:
    make = trainer.Trainer._step

    def counted(self):
        current["step"] = self.state.step + 1
        make(self)

    trainer.Trainer._step = counted


FAULTS = {
    one.__name__: one
    for one in (kill, kill_in_save, stop_in_evaluation, disk, log_disk, numbers, memory, gpu_memory, measure, patience)
}


def inject(faults: dict | None) -> None:
    """Puts faults into this process."""
    _count_steps()
    for name, settings in (faults or {}).items():
        FAULTS[name](**settings)


def serve(lines: TextIO) -> None:
    """Answers requests, a JSON object a line, in a process that has imported the package and done nothing else.

    A request with `words` forks a process for that command, which so does not pay for seconds of imports
    (made_run.Forked is the other end).
    """
    run.draw_run = lambda *arguments: None  # they have tests of their own, and only cost here
    trainer.peak_flops = lambda *arguments: 1e12
    pretraining.validation_samples = lambda *arguments: []
    atexit._clear()  # what pytest does at its end
    atexit.register(multiprocessing.util._exit_function)
    for number, line in enumerate(lines):
        if number == 0:
            cpu_target.target_context.refresh()  # what numba does before the first function that it loads
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                lines.close()
                _become(**request)
        lines.write(json.dumps(answer) + "\n")
        lines.flush()
    os._exit(0)


def _become(words: list[str], folder: str, fault: dict | None, variables: dict[str, str]) -> None:
    os.setsid()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open(Path(folder, name) if number else os.devnull, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
        setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    os.environ.update(variables)
    sys.path[:0] = variables.get("PYTHONPATH", "").split(os.pathsep)
    code = 1
    try:
        inject(fault)
        code = main(words)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:  # as the interpreter does at its end
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    inject(json.loads(os.environ["INJECT"]))
    sys.exit(main(sys.argv[1:]))
