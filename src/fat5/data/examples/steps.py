"""The division of the stream into steps, ranks and micro-batches, and the state between steps.

The unit of order is the pack. Step s uses packs [s·P, (s+1)·P), P = packs_per_step, for any world size, worker count
and micro-batch: rank r of W takes the r-th run of P/W packs, and a micro-batch `packs_per_micro_batch` in succession.
The plan needs lengths alone, so every worker makes the whole plan, and reads the tokens of its own packs only.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from fat5.data.examples.batch import BatchWriter, PackedBatch
from fat5.data.examples.config import BatchConfig
from fat5.data.examples.kernels import Examples
from fat5.data.examples.order import PieceStream
from fat5.data.examples.packing import Window
from fat5.errors import ConfigurationError
from fat5.files import is_count

STATE_VERSION = 1
FURTHEST = 1 << 62  # stream positions are int64, and a window is drawn beyond the cursor
State = dict[str, Any]


class StepPlan(ABC):
    """Divides the stream into steps, and a step into batches of this rank.

    Args:
        stream: the examples in order.
        rank, world_size: this process among those that train together.
        size: packs of a step, or examples of a batch.
        micro_batches: batches of this rank in a step.
        packing: what else the order depends on.
    """

    def __init__(
        self, stream: PieceStream, rank: int, world_size: int, size: int, micro_batches: int, packing: list[int]
    ) -> None:
        check_rank(rank, world_size)
        self.stream, self.rank, self.world_size = stream, rank, world_size
        self.micro_batches = micro_batches
        self.division = [size, world_size, micro_batches]
        self.fingerprint = fingerprint(stream, packing)

    @abstractmethod
    def batches_from(self, state: State, first: int) -> Iterator[tuple[State | None, Examples]]:
        """Yields (state, examples) from batch `first` of the step of `state` on.

        `state` is that after the step for its last batch, and None for the others.
        """

    @abstractmethod
    def write(self, examples: Examples) -> Any:
        """The batch with these examples."""

    def start(self) -> State:
        """The state before the first step."""
        return self.state(0, 0, [])

    def state(self, step: int, cursor: int, window: list[int]) -> State:
        """The complete state at the start of a step."""
        return {
            "version": STATE_VERSION,
            "step": step,
            "epoch": int(min(self.stream.passes(cursor))),
            "cursor": cursor,
            "window": window,
            "division": self.division,
            "fingerprint": self.fingerprint,
        }

    def check(self, state: State) -> None:
        """Raises ConfigurationError if this plan cannot continue from a state."""
        try:
            integers = [state[key] for key in ("version", "step", "cursor", "micro_batch")] + list(state["window"])
            division, saved = state["division"], state["fingerprint"]
        except (KeyError, TypeError) as error:
            raise ConfigurationError("not the state of a data loader", where="data state") from error
        fits = all(map(is_count, integers)) and all(
            position < state["cursor"] < FURTHEST for position in state["window"]
        )
        if not fits or state["version"] != STATE_VERSION:
            raise ConfigurationError("not the state of a data loader of this version", where="data state")
        if saved != self.fingerprint:
            saved = saved if isinstance(saved, dict) else {}
            differs = [key for key, value in self.fingerprint.items() if saved.get(key) != value]
            raise ConfigurationError(
                f"the run was started with another {', '.join(differs)}",
                where="data state",
                hint="Restore it, or start a new run",
            )
        if state["micro_batch"] and (division != self.division or state["micro_batch"] >= self.micro_batches):
            raise ConfigurationError(
                "saved in the middle of a step, which was divided otherwise among processes and micro-batches",
                where="data state",
                hint="Continue with the world size, packs_per_step and packs_per_micro_batch it was saved with",
            )


class PackPlan(StepPlan):
    """Divides the packs of each step among ranks and micro-batches."""

    def __init__(self, stream: PieceStream, config: BatchConfig, rank: int, world_size: int) -> None:
        check_rank(rank, world_size)
        share = world_size * config.packs_per_micro_batch
        if config.packs_per_step % share:
            raise ConfigurationError(
                f"packs_per_step ({config.packs_per_step}) is not a multiple of {world_size} processes × "
                f"{config.packs_per_micro_batch} packs_per_micro_batch",
                where="data.packs_per_step",
                hint=f"Try {-(-config.packs_per_step // share) * share}",
            )
        packing = [config.encoder_tokens, config.decoder_tokens, config.examples_per_pack, config.window]
        super().__init__(stream, rank, world_size, config.packs_per_step, config.packs_per_step // share, packing)
        self.config = config
        self._writer = BatchWriter(stream, config)

    def batches_from(self, state: State, first: int) -> Iterator[tuple[State | None, Examples]]:
        """As `StepPlan.batches_from`."""
        window = Window(self.config.budget(), self.stream.lengths)
        window.restore(state["cursor"], state["window"])
        step, width = int(state["step"]), self.config.packs_per_micro_batch
        per_rank = self.micro_batches * width
        while True:
            packs = [window.next_pack() for _ in range(self.config.packs_per_step)]
            mine = packs[self.rank * per_rank : (self.rank + 1) * per_rank]
            step += 1
            after = self.state(step, window.cursor, window.positions.tolist())
            for turn in range(first, self.micro_batches):
                positions = np.concatenate([p for p in mine[turn * width : (turn + 1) * width] if p is not None])
                yield (after if turn == self.micro_batches - 1 else None), self.stream.resolve(positions)
            first = 0

    def write(self, examples: Examples) -> PackedBatch:
        """The packed batch with these examples."""
        return self._writer.write(examples)


def check_rank(rank: int, world_size: int) -> None:
    """Raises ConfigurationError unless 0 <= rank < world_size."""
    if not 0 <= rank < world_size:
        raise ConfigurationError(f"rank {rank} is not among {world_size} processes", where="rank")


def fingerprint(stream: PieceStream, packing: list[int]) -> dict[str, str]:
    """Hashes of what the order depends on, part by part: a state of another order is refused by the part's name."""
    data = [
        [s.shards.manifest.tokenizer_sha256, [e.sha256 for e in s.shards.entries], s.weight] for s in stream.sources
    ]
    parts = {
        "data": data,
        "seed": stream.seed,
        "mixture": stream.mixture.rows(),
        "max_tokens": stream.max_tokens,
        "packing": packing,
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}
