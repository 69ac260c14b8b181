"""UL2 for stock models: documents to padded examples, in any `DataLoader` or `Trainer`."""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from fat5.data.examples import kernels
from fat5.data.examples.config import BatchConfig
from fat5.data.examples.denoisers import Mixture, MixtureOfDenoisers, split_seed
from fat5.data.examples.order import MIN_MAX_TOKENS, empty_examples, mixture_tables
from fat5.data.examples.padded import PAD_MULTIPLE, PaddedBatch, pad
from fat5.data.tokenizer.loading import as_tokenizer
from fat5.errors import DataError, check_whole

logger = logging.getLogger(__name__)

COLUMN_HINT = "Trainer drops columns that its model does not take: set remove_unused_columns=False"
MAX_EPOCH = 1 << kernels.DOMAIN_SHIFT


class DataCollatorForUL2:
    """Makes a padded batch of UL2 examples of documents: `model(**collator(features))`.

    A feature is a mapping with `input_ids` (raw ids without special tokens) or `text`; other columns are ignored. The
    denoiser and the noise of a feature with `index` are a pure function of (seed, index, `epoch` or 0), as those of a
    piece in `PieceStream`. Without one they are a function of the seed, the rank, the worker (its id and seed, which
    PyTorch's generator gives anew for each iterator) and the features it has collated.

    Args:
        tokenizer: a `Tokenizer`, a folder, or a tokenizer of transformers with sentinels. Missing mode tokens are
            added behind its ids.
        mixture: a name (fat5, fat5-anywhere, ul2, t5, prefix-lm), a list of denoisers, or a `MixtureOfDenoisers`.
        max_tokens: most ids of a document; a longer one is refused, and `pieces` cuts it.
        seed: in [0, 2^63).
        pad_to_multiple_of: of the padded lengths.

    Attributes:
        tokenizer: the `Tokenizer`, with mode tokens. The model needs an embedding of `tokenizer.size` rows.

    Raises:
        ConfigurationError: a mixture, max_tokens, seed or multiple that cannot work.
        TokenizerError: a tokenizer without sentinels, or damaged.
    """

    # How far this copy is; see __getstate__.
    _place: tuple[int, int, int] | None
    _collated: int
    _warned: bool

    def __init__(
        self,
        tokenizer: Any,
        mixture: Mixture = "fat5",
        *,
        max_tokens: int = BatchConfig.max_tokens,
        seed: int = 0,
        pad_to_multiple_of: int = PAD_MULTIPLE,
    ) -> None:
        check_whole(max_tokens, "max_tokens", least=MIN_MAX_TOKENS)
        check_whole(pad_to_multiple_of, "pad_to_multiple_of")
        self.mixture = MixtureOfDenoisers.of(mixture)
        self.tokenizer = as_tokenizer(tokenizer)
        self.max_tokens, self.seed, self.pad_to_multiple_of = max_tokens, seed, pad_to_multiple_of
        self._key = split_seed(seed)
        self._tables = self._make_tables()
        for note in self.mixture.notes(max_tokens, self._tables.sentinels.size):
            logger.warning(note)
        self._begin()

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> PaddedBatch:
        """A `PaddedBatch` of one example a feature: `input_ids`, `attention_mask`, `labels`, int64.

        Raises:
            DataError: no feature, or one that is no document of 2 to `max_tokens` ids; it is named.
        """
        documents = self._documents(features)
        pieces, epochs, (low, high) = self._noise_keys(features)
        tokens = np.concatenate(documents)
        tables = self._tables._replace(
            tokens_address=np.array([tokens.ctypes.data], np.int64), seed_low=low, seed_high=high
        )
        ends = np.cumsum([document.size for document in documents])
        examples = empty_examples(len(documents))
        kernels.resolve_documents(tables, pieces, epochs, ends, examples)
        inputs, targets = np.empty(examples.encoder.sum(), np.int64), np.empty(examples.decoder.sum(), np.int64)
        cu_inputs, cu_targets = np.empty((2, len(documents) + 1), np.int32)
        kernels.write_examples(tables, examples, kernels.TRAINING, inputs, targets, cu_inputs, cu_targets)
        batch = pad(
            np.split(inputs, cu_inputs[1:-1]),
            np.split(targets, cu_targets[1:-1]),
            self.tokenizer.info.pad_id,
            self.pad_to_multiple_of,
        )
        batch.tokens = tokens.size
        return batch

    def pieces(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[np.ndarray]]:
        """Documents cut as `fat5 pretrain` cuts them: for `Dataset.map(batched=True, remove_columns=…)`.

        A document (`input_ids`, else `text`) gives consecutive pieces of at most `max_tokens` ids; a last piece of one
        token takes another from the piece before. Documents of fewer than 2 tokens give none, which is said once.
        """
        column = "input_ids" if "input_ids" in rows else "text"
        if column not in rows:
            raise DataError(f"no column input_ids or text among {', '.join(map(str, rows)) or 'none'}")
        documents = self._tokens(rows[column], column)
        short = sum(document.size < 2 for document in documents)
        if short and not self._warned:
            logger.warning("%d of %d documents have fewer than 2 tokens; such are left out", short, len(documents))
            self._warned = True
        return {"input_ids": [piece for document in documents for piece in cut(document, self.max_tokens)]}

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins anew; so the cache of `Dataset.map`, which hashes the collator, finds it unchanged by use."""
        return {key: value for key, value in self.__dict__.items() if key not in _PROGRESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._place = None
        self._collated = 0
        self._warned = False

    def _documents(self, features: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
        """The ids of each feature: uint32 (L,), 2 <= L <= max_tokens."""
        if not isinstance(features, Sequence) or not all(isinstance(feature, Mapping) for feature in features):
            raise DataError("the collator takes a list of features, each a mapping with input_ids or text")
        if not features:
            raise DataError("the collator got no feature", hint="A batch has at least one document")
        column = "input_ids" if "input_ids" in features[0] else "text"
        for row, feature in enumerate(features):
            if column not in feature:
                what = "neither input_ids nor text" if column == "text" else "no input_ids, and others have"
                raise DataError(
                    f"holds {what}, but {', '.join(map(str, feature)) or 'nothing'}",
                    where=f"document {row}",
                    hint=COLUMN_HINT,
                )
        documents = self._tokens([feature[column] for feature in features], column)
        for row, document in enumerate(documents):
            if not 2 <= document.size <= self.max_tokens:
                fault = "too short to corrupt" if document.size < 2 else f"longer than max_tokens {self.max_tokens:,}"
                raise DataError(
                    f"a document of {document.size:,} token{'s' * (document.size != 1)} is {fault}",
                    where=f"document {row}",
                    hint="Prepare the documents with dataset.map(collator.pieces, batched=True, remove_columns="
                    "dataset.column_names), which cuts long ones and leaves out those below 2 tokens",
                )
        return documents

    def _tokens(self, rows: Iterable[Any], column: str) -> list[np.ndarray]:
        """The ids of documents, checked: uint32 arrays."""
        rows = list(rows)
        if column == "text":
            for row, text in enumerate(rows):
                if not isinstance(text, str):
                    raise DataError(f"text is {type(text).__name__}, not a string", where=f"document {row}")
            return [tokens.astype(np.uint32) for tokens in self.tokenizer.encode_each(rows)]
        return [self._checked(ids, f"document {row}") for row, ids in enumerate(rows)]

    def _checked(self, ids: Any, where: str) -> np.ndarray:
        try:
            tokens = np.asarray(ids)
        except ValueError:  # rows of several lengths
            tokens = np.zeros((0, 0))
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise DataError("input_ids must be a list of whole numbers", where=where)
        size = self.tokenizer.info.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
            odd = int(tokens[(tokens < 0) | (tokens >= size)][0])
            raise DataError(f"id {odd} is not in the tokenizer's vocabulary of {size:,}", where=where)
        special = tokens[self.tokenizer.is_reserved(tokens.astype(np.int64))]
        if special.size:
            name = self.tokenizer.decode([int(special[0])]) or int(special[0])
            raise DataError(
                f"input_ids hold the special token {name}",
                where=where,
                hint="Give raw ids: tokenizer(text, add_special_tokens=False), or the text itself",
            )
        return tokens.astype(np.uint32)

    def _noise_keys(self, features: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
        """Piece and epoch of each feature, int64 (B,), and the key they count under."""
        with_index = sum("index" in feature for feature in features)
        if with_index not in (0, len(features)):
            raise DataError(f"{with_index} of {len(features)} features have an index", hint="Give it to all, or none")
        if with_index:
            epochs = [_whole(feature.get("epoch", 0), "epoch", MAX_EPOCH) for feature in features]
            pieces = [_whole(feature["index"], "index", 1 << 63) for feature in features]
            return np.array(pieces, np.int64), np.array(epochs, np.int64), self._key
        place = _process()
        if place != self._place:  # a worker starts with a copy of the collator of the process that started it
            self._place, self._collated = place, 0
        rank, worker, worker_seed = place
        low, high, _, _ = kernels.philox(
            worker_seed & kernels.MASK32,
            worker_seed >> 32,
            worker,
            (kernels.COLLATION << kernels.DOMAIN_SHIFT) + rank,
            *self._key,
        )
        first = self._collated
        self._collated += len(features)
        return np.arange(first, self._collated), np.zeros(len(features), np.int64), (low, high)

    def _make_tables(self) -> kernels.StreamTables:
        """One source of one shard, which each batch brings, and the mixture."""
        tables: dict[str, Any] = dict.fromkeys(kernels.StreamTables._fields, np.zeros(1, np.int64))
        tables |= {"simple": np.ones(1, bool), "token_bytes": np.full(1, 4, np.int64)}
        return kernels.StreamTables(
            **tables | mixture_tables(self.mixture, self.tokenizer.info, self.max_tokens, self.seed)
        )


_PROGRESS = ("_place", "_collated", "_warned")


def cut(tokens: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Consecutive pieces of 2 to `max_tokens` tokens, as `PieceStream` cuts; none of a document below 2 tokens."""
    count = kernels.pieces_of(tokens.size, max_tokens)
    edges = np.arange(1, count) * max_tokens
    if count > 1 and tokens.size - edges[-1] == 1:
        edges[-1] -= 1
    return np.split(tokens, edges) if count else []


def _process() -> tuple[int, int, int]:
    """The rank, the number of the data worker from 1 (0 in the main process), and the seed PyTorch gave to it."""
    rank = os.environ.get("RANK", "")  # of torchrun; a spawned worker has it too, and no process group
    number = int(rank) if rank.isdecimal() else 0
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        number = torch.distributed.get_rank()
    worker: Any = get_worker_info()
    return (number, worker.id + 1, worker.seed & ((1 << 63) - 1)) if worker else (number, 0, 0)


def _whole(value: Any, name: str, end: int) -> int:
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # of NumPy and PyTorch too
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < end:
        raise DataError(f"must be a whole number in [0, {end:,}), not {value!r}", where=name)
    return number
