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
    folder: Path, documents: Sequence[np.ndarray], shards: int = 1, info: TokenizerInfo | None = None
) -> TokenShards:
    """Writes documents as both splits' shards (validation: the same) and opens `train`."""
    info = info or made_info()
    entries: dict[str, list[ShardEntry]] = {}
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        entries[split] = []
        for number in range(shards):
            part = documents[number * len(documents) // shards : (number + 1) * len(documents) // shards]
            tokens = np.concatenate([*part, np.zeros(0, np.int64)]).astype(info.dtype).tobytes()
            ends = np.cumsum([len(document) for document in part]).astype("<u8").tobytes()
            name = f"{split}/{number:05d}.ds"
            (folder / name).write_bytes(tokens)
            (folder / f"{name}.index").write_bytes(ends)
            hashes = [hashlib.sha256(content).hexdigest() for content in (tokens, ends)]
            entries[split].append(
                ShardEntry(name, len(part), len(tokens) // info.token_bytes, len(tokens), hashes[0], hashes[1])
            )
    manifest = Manifest("made", info.sha256, info.vocab_size, info.token_bytes, 0.5, entries)
    (folder / "manifest.json").write_text(manifest.to_json())
    return open_shards(folder, "train")
