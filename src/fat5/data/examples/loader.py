"""The training stream as batches, made by worker processes, with an exact position.

The unit of order is the pack. Step s uses packs [s·P, (s+1)·P), P = packs_per_step, for any world size, worker count
and micro-batch: rank r of W takes the r-th run of P/W packs, and a micro-batch `packs_per_micro_batch` in succession.
The division needs lengths alone, so every worker makes all of it, and reads the tokens of its own packs only.

A loader's state counts the batches handed out, not those that workers have prepared ahead: the last batch of each step
comes with the state after it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from fat5.data.examples.batch import PackedBatch, write_packed
from fat5.data.examples.config import BatchConfig
from fat5.data.examples.kernels import Examples
from fat5.data.examples.packing import ENDLESS, Window
from fat5.data.examples.workers import batches_from_workers, batches_here
from fat5.errors import ConfigurationError, check_whole
from fat5.files import is_count

STATE_VERSION = 1
State = dict[str, Any]
Batch = TypeVar("Batch")


class Stream(Protocol):
    """Positions 0, 1, 2, … of endless training, each an example."""

    @property
    def max_lengths(self) -> tuple[int, int]:
        """The longest encoder and decoder sides."""

    def lengths(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encoder and decoder tokens of the examples at positions: two int64 arrays."""

    def resolve(self, positions: np.ndarray) -> Any:
        """The examples at positions (int64); their ids are `piece`."""

    def passes(self, cursor: int) -> list[float]:
        """Passes over each source, up to a position."""

    def identity(self) -> dict[str, Any]:
        """What the order depends on, as JSON, part by part."""


class Loader(ABC, Generic[Batch]):
    """Endless iterable of this rank's batches, in order. A subclass divides the stream into steps and batches.

    Args:
        stream: the examples in order.
        size: packs of a step, or examples of a batch.
        micro_batches_per_step: batches of this rank that make one step.
        packing: what else the order depends on.
        rank, world_size: this process among those that train together.
        num_workers: worker processes; 0 makes batches in this process.
        timeout: seconds to wait for a worker before giving up.
        multiprocessing_context: how workers start ("fork", "spawn", "forkserver"); None for Python's default.
    """

    def __init__(
        self,
        stream: Stream,
        size: int,
        micro_batches_per_step: int,
        packing: list[int],
        *,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        timeout: float = 300.0,
        multiprocessing_context: str | None = None,
    ) -> None:
        check_whole(num_workers, "data.num_workers", least=0)
        check_rank(rank, world_size)
        self.stream: Any = stream
        self.rank, self.world_size = rank, world_size
        self.micro_batches_per_step = micro_batches_per_step
        self.num_workers, self.timeout, self.multiprocessing_context = num_workers, timeout, multiprocessing_context
        self._division = [size, world_size, micro_batches_per_step]
        self._fingerprint = fingerprint(stream, packing)
        self._state = self._state_at(0, 0, [])
        self._consumed = 0

    @abstractmethod
    def examples(self) -> Iterator[tuple[Examples, State | None]]:
        """Yields the examples of each batch from the state on; with a step's last batch the state after it."""

    @abstractmethod
    def write(self, examples: Examples) -> Batch:
        """The batch with these examples."""

    @property
    def step(self) -> int:
        """The step the next batch belongs to."""
        return int(self._state["step"])

    def __iter__(self) -> Iterator[Batch]:
        batches = batches_from_workers(self) if self.num_workers else batches_here(self)
        for batch, after in batches:
            self._consumed += 1
            if after is not None:
                self._state, self._consumed = after, 0
            yield batch

    def awaited(self) -> str:
        """The next batch, in words for an error."""
        examples, _ = next(self.examples())
        where = f"micro-batch {self._consumed} of step {self.step}"
        return f"{where}, which starts with piece {int(examples.piece[0])}"

    def state_dict(self) -> State:
        """The position after the batches handed out: small, JSON, and at the end of a step equal on every rank."""
        return self._state | {"micro_batch": self._consumed}

    def load_state_dict(self, state: State) -> None:
        """Continues from `state_dict()`, at the next `iter()`; at a step's end also under another division.

        Raises:
            ConfigurationError: the state is of another order, or from the middle of a step that was divided otherwise.
        """
        self._check(state)
        self._consumed = int(state["micro_batch"])
        self._state = {key: value for key, value in state.items() if key != "micro_batch"}

    def _state_at(self, step: int, cursor: int, window: list[int]) -> State:
        """The complete state at the start of a step."""
        return {
            "version": STATE_VERSION,
            "step": step,
            "epoch": int(min(self.stream.passes(cursor))),
            "cursor": cursor,
            "window": window,
            "division": self._division,
            "fingerprint": self._fingerprint,
        }

    def _check(self, state: State) -> None:
        try:
            integers = [state[key] for key in ("version", "step", "cursor", "micro_batch")] + list(state["window"])
            division, saved = state["division"], state["fingerprint"]
        except (KeyError, TypeError) as error:
            raise ConfigurationError("not the state of a data loader", where="data state") from error
        fits = all(map(is_count, integers)) and all(
            position < state["cursor"] < ENDLESS for position in state["window"]
        )
        if not fits or state["version"] != STATE_VERSION:
            raise ConfigurationError("not the state of a data loader of this version", where="data state")
        if differs := differing(saved, self._fingerprint):
            what = f"the run was started with another {', '.join(differs)}"
            raise ConfigurationError(what, where="data state", hint="Restore it, or start a new run")
        consumed = state["micro_batch"]
        if consumed and (division != self._division or consumed >= self.micro_batches_per_step):
            raise ConfigurationError(
                "saved in the middle of a step, which was divided otherwise among processes and micro-batches",
                where="data state",
                hint="Continue with the world size, packs_per_step and packs_per_micro_batch it was saved with",
            )


class PackedLoader(Loader[PackedBatch]):
    """Endless iterable of `PackedBatch`: this rank's micro-batches in order.

    `workers` are num_workers, timeout and multiprocessing_context of `Loader`.

    Raises:
        ConfigurationError: shapes that do not fit each other or the stream.
    """

    def __init__(
        self, stream: Stream, config: BatchConfig, *, rank: int = 0, world_size: int = 1, **workers: Any
    ) -> None:
        share = world_size * config.packs_per_micro_batch
        packing = list(config.budget())
        micro_batches = config.packs_per_step // share
        super().__init__(
            stream, config.packs_per_step, micro_batches, packing, rank=rank, world_size=world_size, **workers
        )
        if config.packs_per_step % share:
            raise ConfigurationError(
                f"packs_per_step ({config.packs_per_step}) is not a multiple of {world_size} processes × "
                f"{config.packs_per_micro_batch} packs_per_micro_batch",
                where="data.packs_per_step",
                hint=f"Try {-(-config.packs_per_step // share) * share}",
            )
        config.check_longest(*stream.max_lengths)
        self.config = config

    def examples(self) -> Iterator[tuple[Examples, State | None]]:
        window = Window(self.config.budget(), self.stream.lengths)
        window.restore(self._state["cursor"], self._state["window"])
        step, first, width = self.step, self._consumed, self.config.packs_per_micro_batch
        per_rank = self.micro_batches_per_step * width
        while True:
            packs = [window.next_pack() for _ in range(self.config.packs_per_step)]
            mine = packs[self.rank * per_rank : (self.rank + 1) * per_rank]
            step += 1
            after = self._state_at(step, window.cursor, window.positions.tolist())
            for turn in range(first, self.micro_batches_per_step):
                positions = np.concatenate(mine[turn * width : (turn + 1) * width])
                last = turn == self.micro_batches_per_step - 1
                yield self.stream.resolve(positions), after if last else None
            first = 0

    def write(self, examples: Examples) -> PackedBatch:
        return write_packed(self.stream, self.config, examples)


def check_rank(rank: int, world_size: int) -> None:
    """Raises ConfigurationError unless 0 <= rank < world_size."""
    if not 0 <= rank < world_size:
        raise ConfigurationError(f"rank {rank} is not among {world_size} processes", where="rank")


def fingerprint(stream: Stream, packing: list[int]) -> dict[str, str]:
    """Hashes of what the order depends on, part by part: a state of another order is refused by the part's name."""
    parts = {**stream.identity(), "packing": packing}
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}


def differing(saved: Any, own: dict[str, str]) -> list[str]:
    """The parts of a fingerprint that a saved one, which may be anything, has otherwise."""
    saved = saved if isinstance(saved, dict) else {}
    return [str(name) for name in own | saved if saved.get(name) != own.get(name)]
