"""The examples of the training stream, one by one, as datasets of PyTorch for stock models."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from fat5.data.examples.config import BatchConfig
from fat5.data.examples.denoisers import Mixture, MixtureOfDenoisers
from fat5.data.examples.loader import check_rank, differing, fingerprint
from fat5.data.examples.order import PieceStream, WeightedShards
from fat5.data.examples.packing import ENDLESS
from fat5.data.examples.padded import PaddedBatch, pad
from fat5.data.shards.token_shards import TokenShards, open_shards
from fat5.data.tokenizer.loading import load_tokenizer
from fat5.errors import ConfigurationError, DataError, check_whole
from fat5.files import is_count

logger = logging.getLogger(__name__)

STATE_VERSION = 1
CHUNK = 64  # examples made at once
Example = dict[str, np.ndarray]
Source = str | Path | TokenShards | WeightedShards


class UL2Examples(Dataset[Example]):
    """The examples at positions 0, 1, 2, … of the stream, by position: `input_ids` and `labels`, int64 arrays.

    They are those of `PieceStream`, and of every loader of FAT5 with the same arguments. Reading one costs nothing but
    itself, so samplers may skip, shuffle and share positions among workers and ranks.

    Args:
        sources: a prepared folder, its `TokenShards`, or several of either (`WeightedShards` for shares other than 1).
        mixture: as in `DataCollatorForUL2`.
        max_tokens: most raw tokens of an example; longer documents are cut into consecutive pieces.
        seed: of the order, the denoisers and the noise.
        split: of the folders.
        num_examples: the length; None for one pass over the (largest) source. Beyond a pass come new order and noise.

    Raises:
        ConfigurationError, DataError, TokenizerError: as `PieceStream`, `open_shards` and `load_tokenizer`.
    """

    def __init__(
        self,
        sources: Source | Sequence[Source],
        mixture: Mixture = "fat5",
        *,
        max_tokens: int = BatchConfig.max_tokens,
        seed: int = 0,
        split: str = "train",
        num_examples: int | None = None,
    ) -> None:
        given = [sources] if isinstance(sources, Source) else list(sources)
        shards = [open_shards(source, split) if isinstance(source, str | Path) else source for source in given]
        if not shards:
            raise ConfigurationError("no data source is given", where="sources")
        first = shards[0].shards if isinstance(shards[0], WeightedShards) else shards[0]
        info = load_tokenizer(first.folder / "tokenizer").info
        self.stream = PieceStream(shards, MixtureOfDenoisers.of(mixture), info, max_tokens, seed)
        if num_examples is not None:
            check_whole(num_examples, "num_examples", most=ENDLESS)
        self.num_examples = num_examples or self._one_pass()
        for note in self.stream.notes():
            logger.warning(note)

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, position: int) -> Example:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Example]:
        """Several at once, as `DataLoader` asks for a batch."""
        outside = next((position for position in positions if not 0 <= position < self.num_examples), None)
        if outside is not None:
            raise IndexError(f"position {outside} of {self.num_examples}")
        return self.read(np.array(positions, np.int64))

    def read(self, positions: np.ndarray) -> list[Example]:
        """The examples at positions (int64), beyond the length too."""
        inputs, targets, cu_inputs, cu_targets = self.stream.write(self.stream.resolve(positions))
        sides = zip(np.split(inputs, cu_inputs[1:-1]), np.split(targets, cu_targets[1:-1]))
        return [{"input_ids": source, "labels": target} for source, target in sides]

    def collate(self, features: Sequence[Mapping[str, Any]]) -> PaddedBatch:
        """Pads examples to a batch: the `data_collator` of Trainer, the `collate_fn` of DataLoader."""
        if not features:
            raise DataError("no example to collate", hint="A batch has at least one")
        inputs, targets = ([np.asarray(feature[name]) for feature in features] for name in ("input_ids", "labels"))
        return pad(inputs, targets, self.stream.info.pad_id)

    def _one_pass(self) -> int:
        """Positions until every source has been passed over once."""
        tables = self.stream.tables
        return int((-(-tables.pieces * tables.blend_source.size // tables.blend_count)).max())


class UL2Dataset(IterableDataset[Example]):
    """The examples of `UL2Examples` in order, without end; each iterator starts at `position`.

    Batch k of all ranks together holds positions [k·W·B, (k+1)·W·B), W = world_size and B = batch_size, for any number
    of workers. So a run that saw N batches continues with `position=N·W·B`, at no cost.

    Args:
        sources, mixture, max_tokens, seed, split: as in `UL2Examples`.
        batch_size: that of the DataLoader: examples in a row that one worker makes.
        position: of the first example.
        rank, world_size: this process among those that train together; leave them if something else, such as
            accelerate, shares the batches out.
    """

    def __init__(
        self,
        sources: Source | Sequence[Source],
        mixture: Mixture = "fat5",
        *,
        max_tokens: int = BatchConfig.max_tokens,
        seed: int = 0,
        split: str = "train",
        batch_size: int = 1,
        position: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_whole(batch_size, "batch_size")
        check_rank(rank, world_size)
        self.examples = UL2Examples(sources, mixture, max_tokens=max_tokens, seed=seed, split=split)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.position = position
        self.collate = self.examples.collate

    @property
    def position(self) -> int:
        """Where the next iterator starts."""
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        check_whole(position, "position", least=0, most=ENDLESS - 1)
        self._position, self._first, self._made = position, 0, 0

    def __iter__(self) -> Iterator[Example]:
        share, shares = self._share()
        start, made = self._position, self._first
        while True:
            turns = np.arange(made, made + CHUNK)
            blocks = turns // self.batch_size * shares + share
            for example in self.examples.read(start + blocks * self.batch_size + turns % self.batch_size):
                made += 1
                self._made = made
                yield example

    def state_dict(self) -> dict[str, Any]:
        """The position after the examples made in this process: small, JSON.

        A `DataLoader` with workers iterates over copies, and leaves the dataset of the main process where it was.
        """
        _, shares = self._share()
        whole, rest = divmod(self._made, self.batch_size)
        return {
            "version": STATE_VERSION,
            "position": self._position + whole * shares * self.batch_size,
            "made": rest,
            "division": [self.batch_size, shares],
            "fingerprint": fingerprint(self.examples.stream, []),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iterator starts where `state_dict()` was taken; after whole batches also under another division.

        Raises:
            ConfigurationError: the state is of another stream, or from the middle of a batch divided otherwise.
        """
        try:
            position, made, division = state["position"], state["made"], state["division"]
            known = state["version"] == STATE_VERSION and is_count(position) and is_count(made)
        except (KeyError, TypeError):
            known = False
        if not known:
            raise ConfigurationError("not the state of a UL2Dataset of this version", where="data state")
        if differs := differing(state.get("fingerprint"), fingerprint(self.examples.stream, [])):
            raise ConfigurationError(f"the state is of another {', '.join(differs)}", where="data state")
        if made and division != [self.batch_size, self._share()[1]]:
            raise ConfigurationError(
                "saved in the middle of a batch, which was divided otherwise among processes and workers",
                where="data state",
                hint="Continue with the batch_size, world size and worker count it was saved with",
            )
        self.position = position
        self._first = self._made = made

    def _share(self) -> tuple[int, int]:
        """This worker of this rank among all, in the order of their batches."""
        worker: Any = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        return turn * self.world_size + self.rank, turns * self.world_size
