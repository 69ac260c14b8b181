"""The training stream as batches, made by worker processes, with an exact position.

A loader follows a plan (`steps`). Its state counts the batches handed out, not those that workers have prepared ahead:
the last batch of each step comes with the state after it.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import signal_handling

from fat5.data.examples.batch import PackedBatch
from fat5.data.examples.config import BatchConfig
from fat5.data.examples.denoisers import MixtureOfDenoisers
from fat5.data.examples.order import PieceStream, WeightedShards
from fat5.data.examples.steps import PackPlan, State, StepPlan
from fat5.data.worker_process import end_with_parent, leave_signals_to_parent
from fat5.errors import DataError, FAT5Error, check_whole

if TYPE_CHECKING:
    from fat5.data.shards.token_shards import TokenShards
    from fat5.data.tokenizer.loading import TokenizerInfo

PREFETCH = 4  # batches each worker prepares ahead
POLL_SECONDS = 1.0  # between two looks at whether the workers live
Batch = TypeVar("Batch")
logger = logging.getLogger(__name__)


class Loader(Generic[Batch]):
    """Endless iterable of this rank's batches of a plan, in order.

    Args:
        plan: the examples of each step.
        num_workers: worker processes; 0 makes batches in this process.
        timeout: seconds to wait for a worker before giving up.
        multiprocessing_context: how workers start ("fork", "spawn", "forkserver"); None for Python's default.
    """

    def __init__(
        self,
        plan: StepPlan,
        num_workers: int = 0,
        timeout: float = 300.0,
        multiprocessing_context: str | None = None,
    ) -> None:
        check_whole(num_workers, "data.num_workers", least=0)
        self.plan = plan
        self.stream = plan.stream
        self._num_workers = num_workers
        self._timeout = timeout
        self._context = multiprocessing_context
        self._state = plan.start()
        self._consumed = 0

    @property
    def micro_batches_per_step(self) -> int:
        """Batches of this rank that make one step."""
        return self.plan.micro_batches

    @property
    def step(self) -> int:
        """The step the next batch belongs to."""
        return int(self._state["step"])

    @property
    def passes(self) -> list[float]:
        """Passes over each source, up to the start of this step."""
        return self.stream.passes(int(self._state["cursor"]))

    def state_dict(self) -> State:
        """The position after the batches handed out: small, JSON, and at the end of a step equal on every rank."""
        return dict(self._state) | {"micro_batch": self._consumed}

    def load_state_dict(self, state: State) -> None:
        """Continues from `state_dict()`, at the next `iter()`; at a step's end also under another world size,
        worker count, packs_per_step or packs_per_micro_batch.

        Raises:
            ConfigurationError: the state belongs to other data, another seed, mixture or packing, or was saved in the
                middle of a step that was divided otherwise.
        """
        self.plan.check(state)
        self._consumed = int(state["micro_batch"])
        self._state = {key: value for key, value in state.items() if key != "micro_batch"}

    def __iter__(self) -> Iterator[Batch]:
        batches = _Batches(self.plan, self._state, self._consumed)
        for batch, after in iter(batches) if self._num_workers == 0 else self._from_workers(batches):
            self._consumed += 1
            if after is not None:
                self._state, self._consumed = after, 0
            yield batch

    def _from_workers(self, batches: _Batches) -> Iterator[tuple[Batch, State | None]]:
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=self._num_workers,
            timeout=min(POLL_SECONDS, self._timeout),
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=PREFETCH,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # the default would draw from the generator of dropout
            multiprocessing_context=self._context,
        )
        iterator: Any = iter(loader)
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
        kill = partial(_kill, iterator._workers)
        atexit.register(kill)  # at exit, multiprocessing would send SIGTERM and wait
        try:
            while True:
                item = self._next(iterator)
                if isinstance(item, str):
                    raise DataError(item)
                yield item
        finally:
            iterator._shutdown_workers()
            kill()
            atexit.unregister(kill)

    def _next(self, iterator: Any) -> Any:
        """The next item of the workers.

        Raises:
            DataError: a worker died, or none answered in time.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                with _raising_for_dead(iterator):
                    return next(iterator)
            except (RuntimeError, OSError, EOFError) as error:  # a dead worker raises any of them
                silent = str(error).startswith("DataLoader timed out")
                dead = _dead(iterator._workers, wait=not silent)
                if dead:
                    raise self._lost(*dead) from error
                if not silent:
                    raise
                if time.monotonic() >= deadline:
                    hint = "See whether the disk answers; data.num_workers 0 loads in the main process"
                    raise self._lost(f"no worker answered for {self._timeout:g} s", hint) from error

    def _lost(self, who: str, hint: str) -> DataError:
        """The error for workers that died or do not answer; names the batch that was awaited."""
        _, examples = next(self.plan.batches_from(self._state, self._consumed))
        return DataError(
            f"data loading stopped: {who}; awaited was micro-batch {self._consumed} of step {self.step}, "
            f"which starts with piece {int(examples.piece[0])}",
            hint=hint,
        )


class PackedLoader(Loader[PackedBatch]):
    """Endless iterable of `PackedBatch`: this rank's micro-batches in order.

    Args:
        sources: token shards, each with a weight (`WeightedShards`) or alone.
        mixture: denoisers and proportions.
        tokenizer_info: special ids; its hash must be that of the shards.
        batch_config: shapes.
        seed: of order and noise.
        rank, world_size: this process among those that train together.
        num_workers, timeout, multiprocessing_context: as `Loader`.

    Raises:
        ConfigurationError: shapes that do not fit each other or the mixture.
        DataError, TokenizerError: from the sources.
    """

    def __init__(
        self,
        sources: Sequence[WeightedShards | TokenShards],
        mixture: MixtureOfDenoisers,
        tokenizer_info: TokenizerInfo,
        batch_config: BatchConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        timeout: float = 300.0,
        multiprocessing_context: str | None = None,
    ) -> None:
        stream = PieceStream(sources, mixture, tokenizer_info, batch_config.max_tokens, seed)
        plan = PackPlan(stream, batch_config, rank, world_size)
        for note in stream.notes() if rank == 0 else []:
            logger.warning(note)
        super().__init__(plan, num_workers, timeout, multiprocessing_context)


class _Batches(IterableDataset):  # type: ignore[misc]
    """The batches of one rank; each worker makes every n-th."""

    def __init__(self, plan: StepPlan, state: State, first: int) -> None:
        self.plan, self.state, self.first = plan, state, first

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        count, index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        try:
            for turn, (after, examples) in enumerate(self.plan.batches_from(self.state, self.first)):
                if turn % count == index:
                    yield self._write(examples, pin=worker is None), after
        except (FAT5Error, OSError, MemoryError) as error:
            if worker is None:
                raise
            # A worker's exception would reach the user as a traceback in a traceback; one line is enough.
            yield f"worker {index} (pid {os.getpid()}): {error or 'out of memory'}"

    def _write(self, examples: Any, pin: bool) -> Any:
        try:
            batch = self.plan.write(examples)
        except DataError as error:
            raise DataError(
                f"{error} It was needed for the batch that starts with piece {int(examples.piece[0])}"
            ) from error
        return batch.pin_memory() if pin and torch.cuda.is_available() else batch


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
