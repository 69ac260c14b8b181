"""Near-duplicates among texts, by MinHash over character 5-grams."""

import re
from itertools import pairwise

import numpy as np

SHINGLE, BANDS, BAND_ROWS, SAME = 5, 16, 8, 0.8


def normalise(text: str) -> str:
    """Words in lower case, apart by a space: what two texts are compared by."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def near_duplicates(texts: list[str]) -> np.ndarray:
    """Bool (n): which texts share at least SAME of their character 5-grams (Jaccard) with an earlier one that stays.

    MinHash with banding (Broder 1997): 128 hashes, 16 bands of 8; pairs in a band are compared by all 128. At a
    similarity of 0.8 a pair meets with probability 0.95, at 0.9 with 0.9999.
    """
    hashes = _minhashes([normalise(text) for text in texts])
    factors = np.random.default_rng(1).integers(1 << 63, size=BAND_ROWS, dtype=np.uint64) | np.uint64(1)
    dropped = np.zeros(len(texts), bool)
    for band in np.split(hashes, BANDS, axis=1):
        keys = (band * factors).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=keys[order[:1]] + np.uint64(1)))
        for start, end in pairwise((*starts, len(order))):
            alike = order[start:end][~dropped[order[start:end]]] if end - start > 1 else order[:0]
            while len(alike) > 1:
                same = (hashes[alike[1:]] == hashes[alike[0]]).mean(axis=1) >= SAME
                dropped[alike[1:][same]] = True
                alike = alike[1:][~same]
    return dropped


def _minhashes(texts: list[str]) -> np.ndarray:
    random = np.random.default_rng(0)
    factors, terms = random.integers(1 << 63, size=(2, BANDS * BAND_ROWS), dtype=np.uint64) * np.uint64(2) + 1
    hashes = np.empty((len(texts), len(factors)), np.uint32)
    for start in range(0, len(texts), 4096):
        shingles = [_shingles(text) for text in texts[start : start + 4096]]
        first = np.cumsum([0, *(len(one) for one in shingles[:-1])])
        joined = np.concatenate(shingles)
        for column, (factor, term) in enumerate(zip(factors, terms, strict=True)):
            values = joined * factor + term >> np.uint64(32)
            hashes[start : start + len(first), column] = np.minimum.reduceat(values, first)
    return hashes


def _shingles(text: str) -> np.ndarray:
    codes = np.frombuffer(text.ljust(SHINGLE).encode("utf-32-le"), np.uint32).astype(np.uint64)
    mixed = np.zeros(len(codes) - SHINGLE + 1, np.uint64)
    for place in range(SHINGLE):
        mixed = mixed * np.uint64(0x100000001B3) + codes[place : place + len(mixed)]
    return mixed
