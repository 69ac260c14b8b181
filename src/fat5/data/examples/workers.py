"""Worker processes that make the batches of a loader: in order, watched, and named when they die or fall silent."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import signal_handling

from fat5.data.worker_process import end_with_parent, leave_signals_to_parent
from fat5.errors import DataError, FAT5Error

if TYPE_CHECKING:
    from fat5.data.examples.loader import Loader

PREFETCH = 4  # batches each worker prepares ahead
POLL_SECONDS = 1.0  # between two looks at whether the workers live


def batches_here(loader: Loader[Any], turn: int = 0, turns: int = 1) -> Iterator[tuple[Any, Any]]:
    """(batch, state after it) of every `turns`-th batch, made in this process."""
    for number, (examples, after) in enumerate(loader.examples()):
        if number % turns == turn:
            try:
                batch = loader.write(examples)
            except DataError as error:
                first = int(examples.piece[0])
                raise DataError(f"{error} It was needed for the batch that starts with piece {first}") from error
            pin = get_worker_info() is None and torch.cuda.is_available()
            yield batch.pin_memory() if pin else batch, after


def batches_from_workers(loader: Loader[Any]) -> Iterator[tuple[Any, Any]]:
    """(batch, state after it) of every batch; DataError if a worker met one, died, or none answered in time."""
    iterator: Any = iter(
        DataLoader(
            _InWorker(loader),
            batch_size=None,
            num_workers=loader.num_workers,
            timeout=min(POLL_SECONDS, loader.timeout),
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=PREFETCH,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the default would draw from the generator of dropout
            multiprocessing_context=loader.multiprocessing_context,
        )
    )
    signal_handling._remove_worker_pids(id(iterator))
    iterator._worker_pids_set = False
    kill = partial(_kill, iterator._workers)
    atexit.register(kill)  # at exit, multiprocessing would send SIGTERM and wait
    try:
        while True:
            item = _next(iterator, loader)
            if isinstance(item, str):
                raise DataError(item)
            yield item
    finally:
        iterator._shutdown_workers()
        kill()
        atexit.unregister(kill)


class _InWorker(IterableDataset):  # type: ignore[misc]
    """The batches of one rank; each worker makes every n-th."""

    def __init__(self, loader: Loader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        worker: Any = get_worker_info()
        try:
            yield from batches_here(self.loader, worker.id, worker.num_workers)
        except (FAT5Error, OSError, MemoryError) as error:
            # A worker's exception would reach the user as a traceback in a traceback; one line is enough.
            yield f"worker {worker.id} (pid {os.getpid()}): {error or 'out of memory'}"


def _next(iterator: Any, loader: Loader[Any]) -> Any:
    """The next item of the workers."""
    deadline = time.monotonic() + loader.timeout
    while True:
        try:
            with _raising_for_dead(iterator):
                return next(iterator)
        except (RuntimeError, OSError, EOFError) as error:  # a dead worker raises any of them
            silent = str(error).startswith("DataLoader timed out")
            lost = _dead(iterator._workers, wait=not silent)
            if not lost and not silent:
                raise
            if not lost and time.monotonic() >= deadline:
                hint = "See whether the disk answers; data.num_workers 0 loads in the main process"
                lost = f"no worker answered for {loader.timeout:g} s", hint
            if lost:
                who, hint = lost
                raise DataError(f"data loading stopped: {who}; awaited was {loader.awaited()}", hint=hint) from error


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    leave_signals_to_parent()
    end_with_parent()


@contextmanager
def _raising_for_dead(iterator: Any) -> Iterator[None]:
    """Inside, torch's SIGCHLD handler raises RuntimeError when a worker dies, and at once if one is dead.

    Outside it must not: the error would interrupt a step or a save.
    """
    signal_handling._set_worker_pids(id(iterator), tuple(worker.pid for worker in iterator._workers))
    try:
        signal_handling._error_if_any_worker_fails()
        yield
    finally:
        signal_handling._remove_worker_pids(id(iterator))


def _dead(workers: Sequence[Any], wait: bool) -> tuple[str, str] | None:
    """Which workers died, and a hint. With `wait`, one that is about to die is awaited."""
    if wait:
        connection.wait([worker.sentinel for worker in workers], timeout=1.0)
    found = {index: worker for index, worker in enumerate(workers) if worker.exitcode is not None}
    if not found:
        return None
    told = [
        f"worker {index} (pid {worker.pid}) died with exit code {worker.exitcode}" for index, worker in found.items()
    ]
    why = "Lower data.num_workers if memory ran out; 0 loads in the main process"
    if any(worker.exitcode == -signal.SIGBUS for worker in found.values()):
        why = "Shared memory (/dev/shm) is full: enlarge it (docker run --shm-size), or set data.num_workers to 0"
    return ", ".join(told), f"{why}. The same command continues a run from its last checkpoint"


def _kill(workers: Sequence[Any]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
