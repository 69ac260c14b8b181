"""Texts of the stock side of french_stock.py: which go into a batch, and T5's span corruption of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from fat5.data import PaddedBatch
from fat5.data.examples.padded import pad

NOISE_DENSITY, MEAN_SPAN = 0.15, 3.0
WIDTHS = (32, 48, 64, 96, 128, 192, 256, 512, 1024)
"""Encoder tokens of a compiled batch of documents."""
GROUP = 50
"""Batches of a group, as in Trainer's `group_by_length`."""


class Documents(Dataset[dict[str, Any]]):
    """Token ids of texts."""

    def __init__(self, texts: Sequence[np.ndarray]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.texts[index]}


class ShuffledGroups(Sampler[list[int]]):
    """Batches of texts of similar lengths, in random order, another one each time."""

    def __init__(self, lengths: Sequence[int], rows: int, seed: int) -> None:
        self.lengths, self.rows = np.array(lengths), rows
        self.random = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.random.permutation(len(self.lengths))
        groups = np.split(order, range(GROUP * self.rows, len(order), GROUP * self.rows))
        ordered = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        batches = ordered[: len(self) * self.rows].reshape(-1, self.rows)
        return iter(self.random.permutation(batches).tolist())

    def __len__(self) -> int:
        return len(self.lengths) // self.rows


class SpanCorruption:
    """T5's span corruption of a list of texts (Raffel et al. 2020, section 3.1.4), padded to the longest, or to the
    first of some widths that holds all.
    """

    def __init__(self, sentinels: np.ndarray, eos: int, pad_id: int, widths: Sequence[int] = ()) -> None:
        self.sentinels, self.eos, self.pad_id, self.widths = sentinels, eos, pad_id, widths
        self.random: np.random.Generator | None = None

    def __call__(self, features: Sequence[dict[str, Any]]) -> PaddedBatch:
        if self.random is None:  # a data worker has a seed of its own
            self.random = np.random.default_rng(torch.initial_seed())
        pairs = [self.corrupt(np.asarray(row["input_ids"], np.int64), self.random) for row in features]
        longest = max(len(inputs) for inputs, _ in pairs)
        return self.fill(pairs, next((width for width in self.widths if width >= longest), 0))

    def fill(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]], width: int) -> PaddedBatch:
        """Examples padded to a width, their targets to the most that inputs of it can have; or to the longest, of 0."""
        batch = pad(*zip(*pairs), self.pad_id)
        sizes = {"input_ids": width, "attention_mask": width, "labels": width // 4 + 8} if width else {}
        for name, size in sizes.items():
            value = {"input_ids": self.pad_id, "attention_mask": 0, "labels": -100}[name]
            batch[name] = torch.nn.functional.pad(batch[name], (0, size - batch[name].shape[1]), value=value)
        return batch

    def corrupt(self, ids: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Inputs with a sentinel for each span; targets with the spans behind their sentinels; both end with EOS."""
        noise, spans = noise_of(len(ids), len(self.sentinels))
        lengths = np.stack([parts(len(ids) - noise, spans, random), parts(noise, spans, random)], axis=1).ravel()
        masked = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
        begins = masked & ~np.concatenate([[False], masked[:-1]])
        kept = np.where(begins, self.sentinels[np.maximum(np.cumsum(begins) - 1, 0)], ids)[~masked | begins]
        spoken = np.insert(ids[masked], np.flatnonzero(begins[masked]), self.sentinels[:spans])
        return np.append(kept, self.eos), np.append(spoken, self.eos)


def noise_of(length: int, sentinels: int) -> tuple[int, int]:
    """Noise tokens and spans of a text."""
    noise = min(max(round(length * NOISE_DENSITY), 1), length - 1)
    return noise, min(max(round(noise / MEAN_SPAN), 1), noise, length - noise, sentinels)


def parts(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` lengths of at least 1 that add up to `total`, each division as likely as any other."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def chunk_length(inputs: int) -> int:
    """The longest text whose corrupted inputs have at most `inputs` tokens."""
    length = inputs
    while (lambda n, s: length + 1 - n + s + 1)(*noise_of(length + 1, 1 << 20)) <= inputs:
        length += 1
    return length
