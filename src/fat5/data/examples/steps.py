"""What each step of training reads: packs divided among ranks and micro-batches, and the state between steps.

The unit of order is the pack. Step s uses packs [s·P, (s+1)·P), P = packs_per_step, whatever the world size, the worker
count or the micro-batch: rank r of W takes the r-th run of P/W of them, a micro-batch is `packs_per_micro_batch` in
succession. The plan is made from lengths alone, so every worker makes the whole plan and reads only its own packs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from fat5.data.examples.batch import BatchConfig, BatchWriter, PackedBatch
from fat5.data.examples.kernels import Examples
from fat5.data.examples.order import PieceStream
from fat5.data.examples.packing import Window
from fat5.errors import ConfigurationError
from fat5.files import is_count

STATE_VERSION = 1
FURTHEST = 1 << 62  # stream positions are int64, and a window is drawn beyond the cursor
State = dict[str, Any]


class Plan(Protocol):
    """What a loader needs to know: the division of the stream into steps, and of a step into batches of this rank."""

    stream: PieceStream
    micro_batches: int
    division: list[int]
    fingerprint: dict[str, str]

    def start(self) -> State:
        """The state before the first step."""
        ...

    def batches_from(self, state: State, first: int) -> Iterator[tuple[State | None, Examples]]:
        """From batch `first` of the step of `state` on: (state after the step, where it ends one; examples)."""
        ...

    def write(self, examples: Examples) -> Any:
        """The batch that holds the examples."""
        ...


def state_of(plan: Plan, step: int, cursor: int, window: list[int]) -> State:
    """The state at the start of a step: everything there is to know."""
    return {
        "version": STATE_VERSION,
        "step": step,
        "epoch": int(min(plan.stream.passes(cursor))),
        "cursor": cursor,
        "window": window,
        "division": plan.division,
        "fingerprint": plan.fingerprint,
    }


def check_state(plan: Plan, state: State) -> None:
    """Raises ConfigurationError where `plan` cannot continue from a state."""
    try:
        integers = [state[key] for key in ("version", "step", "cursor", "micro_batch")] + list(state["window"])
        division, saved = state["division"], state["fingerprint"]
    except (KeyError, TypeError) as error:
        raise ConfigurationError("not the state of a data loader", where="data state") from error
    fits = all(map(is_count, integers)) and all(position < state["cursor"] < FURTHEST for position in state["window"])
    if not fits or state["version"] != STATE_VERSION:
        raise ConfigurationError("not the state of a data loader of this version", where="data state")
    ours = plan.fingerprint
    if saved != ours:
        differs = [key for key in ours if not isinstance(saved, dict) or saved.get(key) != ours[key]]
        raise ConfigurationError(
            f"the run was started with another {', '.join(differs)}",
            where="data state",
            hint="Restore it, or start a new run",
        )
    if state["micro_batch"] and (division != plan.division or state["micro_batch"] >= plan.micro_batches):
        raise ConfigurationError(
            "saved in the middle of a step, under another division of the step among processes and micro-batches",
            where="data state",
            hint="Continue with the world size, packs_per_step and packs_per_micro_batch it was saved with",
        )


class PackPlan:
    """Divides the packs of each step among ranks and micro-batches, and knows the state between steps."""

    def __init__(self, stream: PieceStream, config: BatchConfig, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ConfigurationError(f"rank {rank} is not among {world_size} processes", where="rank")
        share = world_size * config.packs_per_micro_batch
        if config.packs_per_step % share:
            raise ConfigurationError(
                f"packs_per_step ({config.packs_per_step}) is not a multiple of {world_size} processes × "
                f"{config.packs_per_micro_batch} packs_per_micro_batch",
                where="data.packs_per_step",
                hint=f"Try {-(-config.packs_per_step // share) * share}",
            )
        self.stream, self.config, self.rank, self.world_size = stream, config, rank, world_size
        self.per_rank = config.packs_per_step // world_size
        self.micro_batches = self.per_rank // config.packs_per_micro_batch
        self.division = [config.packs_per_step, world_size, self.micro_batches]
        self._writer = BatchWriter(stream, config)
        packing = [config.encoder_tokens, config.decoder_tokens, config.examples_per_pack, config.window]
        self.fingerprint = fingerprint(stream, packing)

    def start(self) -> State:
        """The state before the first step."""
        return state_of(self, 0, 0, [])

    def batches_from(self, state: State, first: int) -> Iterator[tuple[State | None, Examples]]:
        """From batch `first` of the step of `state` on: (state after the step, where it ends one; examples)."""
        window = Window(self.config.budget(), self.stream.lengths)
        window.restore(state["cursor"], state["window"])
        step, width = int(state["step"]), self.config.packs_per_micro_batch
        while True:
            packs = [window.next_pack() for _ in range(self.config.packs_per_step)]
            mine = packs[self.rank * self.per_rank : (self.rank + 1) * self.per_rank]
            step += 1
            after = state_of(self, step, window.cursor, window.positions.tolist())
            for turn in range(first, self.micro_batches):
                positions = np.concatenate([p for p in mine[turn * width : (turn + 1) * width] if p is not None])
                yield (after if turn == self.micro_batches - 1 else None), self.stream.resolve(positions)
            first = 0

    def write(self, examples: Examples) -> PackedBatch:
        """The batch that holds the examples."""
        return self._writer.write(examples)


def fingerprint(stream: PieceStream, packing: list[int]) -> dict[str, str]:
    """What the order depends on, hashed by part, so that a state is refused where it would continue something else."""
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
