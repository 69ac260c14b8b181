"""The training stream as packed batches: worker processes, exact position, elastic order.

The unit of order is the pack. Step s uses packs [s·P, (s+1)·P), P = packs_per_step, whatever the world size, the worker
count or the micro-batch: rank r of W takes the r-th run of P/W of them, a micro-batch is `packs_per_micro_batch` in
succession. The plan is made from lengths alone, so every worker makes the whole plan and reads only its own packs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fat5.data.batch import BatchConfig, BatchWriter, PackedBatch
from fat5.data.denoisers import MixtureOfDenoisers
from fat5.data.order import PieceStream, Source
from fat5.data.packing import Window
from fat5.errors import ConfigurationError, DataError, FAT5Error

if TYPE_CHECKING:
    from fat5.data.shards import TokenShards
    from fat5.data.tokenizer import TokenizerInfo

STATE_VERSION = 1
Item = tuple[PackedBatch, "dict[str, Any] | None"]


class PackedLoader:
    """Endless iterable of `PackedBatch`: this rank's micro-batches in order.

    Args:
        sources: token shards, each with a weight (`Source`) or alone.
        mixture: denoisers and proportions.
        tokenizer_info: special ids; its hash must be that of the shards.
        batch_config: shapes.
        seed: of order and noise.
        rank, world_size: this process among those that train together.
        num_workers: worker processes; 0 prepares batches in this one.
        timeout: seconds to wait for a worker before giving up.

    Raises:
        ConfigurationError: shapes that do not fit each other or the mixture.
        DataError, TokenizerError: from the sources.
    """

    def __init__(
        self,
        sources: Sequence[Source | TokenShards],
        mixture: MixtureOfDenoisers,
        tokenizer_info: TokenizerInfo,
        batch_config: BatchConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        timeout: float = 300.0,
    ) -> None:
        if num_workers < 0:
            raise ConfigurationError(f"must be 0 or more, not {num_workers}", where="data.num_workers")
        self.stream = PieceStream(sources, mixture, tokenizer_info, batch_config.max_tokens, seed)
        self._packs = StepPacks(self.stream, batch_config, rank, world_size)
        self._num_workers = num_workers
        self._timeout = timeout
        self._state = self._packs.start()
        self._consumed = 0

    @property
    def micro_batches_per_step(self) -> int:
        """Batches of this rank that make one optimizer step."""
        return self._packs.micro_batches

    @property
    def step(self) -> int:
        """The step the next batch belongs to."""
        return int(self._state["step"])

    @property
    def passes(self) -> list[float]:
        """How often each source has been passed over so far."""
        return self.stream.passes(self._state["cursor"])

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches handed out so far: small, JSON, the same on every rank at a step's end."""
        return dict(self._state) | {"micro_batch": self._consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict()`; takes effect at the next `iter()`. World size, workers and micro-batch may differ.

        Raises:
            ConfigurationError: the state is of other data, another seed, mixture or packing, or was saved in the middle
                of a step under another division of the step.
        """
        self._packs.check(state)
        self._consumed = int(state["micro_batch"])
        self._state = {key: value for key, value in state.items() if key != "micro_batch"}

    def __iter__(self) -> Iterator[PackedBatch]:
        dataset = _Batches(self._packs, self._state, self._consumed)
        items = self._in_process(dataset) if self._num_workers == 0 else self._in_workers(dataset)
        for batch, after in items:
            self._consumed += 1
            if after is not None:
                self._state, self._consumed = after, 0
            yield batch

    def _in_process(self, dataset: _Batches) -> Iterator[Item]:
        for batch, after in dataset:
            yield (batch.pin_memory() if torch.cuda.is_available() else batch), after

    def _in_workers(self, dataset: _Batches) -> Iterator[Item]:
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._num_workers,
            timeout=self._timeout,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4,
            worker_init_fn=_one_thread,
        )
        iterator: Any = iter(loader)
        try:
            while True:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                except RuntimeError as error:
                    raise self._lost(iterator, error) from error
                if isinstance(item, str):
                    raise DataError(item)
                yield item
        finally:
            shut_down = getattr(iterator, "_shutdown_workers", None)
            if shut_down is not None:
                shut_down()

    def _lost(self, iterator: Any, error: RuntimeError) -> DataError:
        """What to tell when workers die or fall silent: which worker, and the batch that was awaited."""
        turn = self._consumed
        _, examples = next(self._packs.micro_batches_from(self._state, turn))
        workers = getattr(iterator, "_workers", [])
        dead = [
            f"worker {index} (pid {worker.pid}, exit code {worker.exitcode})"
            for index, worker in enumerate(workers)
            if worker.exitcode is not None
        ]
        who = ", ".join(dead) or f"a worker (silent for {self._timeout:g} s)"
        return DataError(
            f"data loading stopped: {who}, at step {self.step}, micro-batch {turn}, which starts with piece {int(examples.piece[0])}",
            hint="If it was killed for memory, lower data.num_workers; data.num_workers 0 loads in the main process",
        )


class StepPacks:
    """Divides the packs of each step among ranks and micro-batches, and knows the state between steps."""

    def __init__(self, stream: PieceStream, config: BatchConfig, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ConfigurationError(f"rank {rank} is not among {world_size} processes", where="rank")
        if config.packs_per_step % (world_size * config.packs_per_micro_batch):
            raise ConfigurationError(
                f"packs_per_step ({config.packs_per_step}) is not a multiple of {world_size} processes × "
                f"{config.packs_per_micro_batch} packs_per_micro_batch",
                where="data.packs_per_step",
                hint=f"Try {-(-config.packs_per_step // (world_size * config.packs_per_micro_batch)) * world_size * config.packs_per_micro_batch}",
            )
        self.stream, self.config, self.rank, self.world_size = stream, config, rank, world_size
        self.per_rank = config.packs_per_step // world_size
        self.micro_batches = self.per_rank // config.packs_per_micro_batch
        self.writer = BatchWriter(stream, config)
        self.fingerprint = fingerprint(stream, config)

    def start(self) -> dict[str, Any]:
        """The state before the first step."""
        return self._state(0, 0, [])

    def check(self, state: dict[str, Any]) -> None:
        """Raises ConfigurationError where a state cannot be continued from."""
        try:
            integers = [state[key] for key in ("version", "step", "cursor", "micro_batch")] + list(state["window"])
            geometry, saved = state["micro_batches"], state["fingerprint"]
        except (KeyError, TypeError) as error:
            raise ConfigurationError("not the state of a data loader", where="data state") from error
        if not all(isinstance(value, int) and value >= 0 for value in integers) or state["version"] != STATE_VERSION:
            raise ConfigurationError("not the state of a data loader of this version", where="data state")
        if saved != self.fingerprint:
            differs = [
                key
                for key in self.fingerprint
                if not isinstance(saved, dict) or saved.get(key) != self.fingerprint[key]
            ]
            raise ConfigurationError(
                f"the run was started with another {', '.join(differs)}",
                where="data state",
                hint="Restore it, or start a new run",
            )
        if state["micro_batch"] and geometry != self.micro_batches:
            raise ConfigurationError(
                f"saved in the middle of a step of {geometry} micro-batches, which now has {self.micro_batches}",
                where="data state",
                hint="Continue with the world size and packs_per_micro_batch it was saved with",
            )

    def micro_batches_from(self, state: dict[str, Any], first: int = 0) -> Iterator[tuple[dict[str, Any] | None, Any]]:
        """From micro-batch `first` of the step of `state` on: (state after the step, where it ends one; examples)."""
        window = Window(self.config.budget(), self.stream.lengths)
        window.restore(state["cursor"], state["window"])
        step, width = int(state["step"]), self.config.packs_per_micro_batch
        while True:
            packs = [window.next_pack() for _ in range(self.config.packs_per_step)]
            mine = packs[self.rank * self.per_rank : (self.rank + 1) * self.per_rank]
            step += 1
            after = self._state(step, window.cursor, window.positions.tolist())
            for turn in range(first, self.micro_batches):
                positions = np.concatenate([p for p in mine[turn * width : (turn + 1) * width] if p is not None])
                yield (after if turn == self.micro_batches - 1 else None), self.stream.resolve(positions)
            first = 0

    def _state(self, step: int, cursor: int, window: list[int]) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "step": step,
            "epoch": int(min(self.stream.passes(cursor))),
            "cursor": cursor,
            "window": window,
            "micro_batches": self.micro_batches,
            "fingerprint": self.fingerprint,
        }


class _Batches(IterableDataset):  # type: ignore[misc]
    """The micro-batches of one rank; each worker makes every n-th."""

    def __init__(self, packs: StepPacks, state: dict[str, Any], first: int) -> None:
        self.packs, self.state, self.first = packs, state, first

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        count, index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        turn = 0
        try:
            for after, examples in self.packs.micro_batches_from(self.state, self.first):
                if turn % count == index:
                    yield self._batch(examples), after
                turn += 1
        except FAT5Error as error:
            if worker is None:
                raise
            # A worker's exception would reach the user as a traceback in a traceback; its line is enough.
            yield f"worker {index} (pid {os.getpid()}): {error}"

    def _batch(self, examples: Any) -> PackedBatch:
        try:
            return self.packs.writer.write(examples)
        except DataError as error:
            raise DataError(
                f"{error} (needed for the batch that starts with piece {int(examples.piece[0])})"
            ) from error


def fingerprint(stream: PieceStream, config: BatchConfig) -> dict[str, str]:
    """What the order depends on, hashed by part, so that a state is refused where it would continue something else."""
    parts = {
        "data": [
            [s.shards.manifest.tokenizer_sha256, [e.sha256 for e in s.shards.entries], s.weight] for s in stream.sources
        ],
        "seed": stream.seed,
        "mixture": stream.mixture.rows(),
        "max_tokens": config.max_tokens,
        "packing": [config.encoder_tokens, config.decoder_tokens, config.examples_per_pack, config.window],
        "packs_per_step": config.packs_per_step,
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
