"""Corpora made for the tests: documents of random token ids, written as the shards that `fat5 prepare` writes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fat5.data.shards.token_shards import Manifest, ShardEntry, TokenShards, open_shards
from fat5.data.tokenizer.loading import TokenizerInfo

FIRST_TOKEN = 400  # ids below are special, so that specials never occur in text


def made_info(sentinels: int = 256, vocab_size: int = 1024) -> TokenizerInfo:
    modes = {"[R]": 3, "[S]": 4, "[X]": 5}
    return TokenizerInfo(vocab_size, 0, 1, 2, tuple(range(10 + sentinels - 1, 9, -1)), modes, "a" * 64)


def made_documents(lengths: Sequence[int] | np.ndarray, seed: int = 0, vocab_size: int = 1024) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(FIRST_TOKEN, vocab_size, int(length)) for length in lengths]


def write_corpus(
    folder: Path,
    documents: Sequence[np.ndarray],
    shards: int = 1,
    info: TokenizerInfo | None = None,
    validation: Sequence[np.ndarray] | None = None,
    name: str = "made",
    fraction: float = 0.5,
) -> TokenShards:
    """Writes documents as both splits' shards (validation: the same if None) and opens `train`."""
    info = info or made_info()
    entries: dict[str, list[ShardEntry]] = {}
    for split, given in (("train", documents), ("validation", documents if validation is None else validation)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        entries[split] = []
        for number in range(shards):
            part = given[number * len(given) // shards : (number + 1) * len(given) // shards]
            tokens = np.concatenate([*part, np.zeros(0, np.int64)]).astype(info.dtype)
            ends = np.cumsum([len(document) for document in part]).astype("<u8").tobytes()
            file = f"{split}/{number:05d}.ds"
            (folder / file).write_bytes(tokens.tobytes())
            (folder / f"{file}.index").write_bytes(ends)
            hashes = [hashlib.sha256(content).hexdigest() for content in (tokens.tobytes(), ends)]
            unknown = int((tokens == info.unk_id).sum())
            entries[split].append(
                ShardEntry(file, len(part), len(tokens), tokens.nbytes, hashes[0], hashes[1], unknown)
            )
    manifest = Manifest(name, info.sha256, info.vocab_size, info.token_bytes, fraction, entries)
    (folder / "manifest.json").write_text(manifest.to_json())
    return open_shards(folder, "train")
