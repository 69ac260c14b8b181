"""Is the UL2 pipeline 10 times as fast as a plain NumPy collator, at fill 99% / 97%? (numbers.md, C3)

One process, one core. Corpora of random tokens, written as shards: paragraphs of about 61 tokens, pieces of 1,024, and
documents of 50 to 1,024. "fat5" runs the whole path of training: order, denoiser, lengths, packing, corruption,
PackedBatch. "numpy" is a collator of the usual form, one example at a time: a shuffled mask of segment starts,
`np.where` on shifted masks for sentinels, a filter, concatenation, and padding of the batch to its longest. Both apply
the same mixture to the same documents, and both are checked to reconstruct them. Useful tokens are raw document tokens,
each counted once.

    python benchmarks/ul2.py
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np

from fat5.data import (
    BatchConfig,
    MixtureOfDenoisers,
    PackedLoader,
    PieceStream,
    TokenizerInfo,
    TokenShards,
    open_shards,
    reconstruct,
    suggest_budgets,
    unpack,
)
from fat5.data.shards.token_shards import Manifest, ShardEntry
from measure import interleaved, row, save

VOCABULARY = 32768
FIRST_TOKEN = 300
INFO = TokenizerInfo(
    VOCABULARY, 0, 1, 2, tuple(range(6, 262)), {"[R]": 3, "[S]": 4, "[X]": 5}, sha256(b"benchmark").hexdigest()
)
BATCH_SIZE = 64


def write_shards(folder: Path, lengths: np.ndarray, rng: np.random.Generator) -> TokenShards:
    """A corpus of random documents of these lengths, as `fat5 prepare` writes one."""
    tokens = rng.integers(FIRST_TOKEN, VOCABULARY, int(lengths.sum())).astype("<u2").tobytes()
    ends = np.cumsum(lengths).astype("<u8").tobytes()
    (folder / "train").mkdir(parents=True)
    (folder / "train/0.ds").write_bytes(tokens)
    (folder / "train/0.ds.index").write_bytes(ends)
    hashes = sha256(tokens).hexdigest(), sha256(ends).hexdigest()
    entry = ShardEntry("train/0.ds", lengths.size, len(tokens) // 2, len(tokens), *hashes)
    manifest = Manifest("benchmark", INFO.sha256, VOCABULARY, 2, 0.0, {"train": [entry]})
    (folder / "manifest.json").write_text(manifest.to_json())
    return open_shards(folder)


def noise_mask(length: int, noise_tokens: int, spans: int, rng: np.random.Generator) -> np.ndarray:
    """bool (length,): which tokens a span-corruption objective hides, spans alternating with kept segments."""

    def segments(items: int, parts: int) -> np.ndarray:
        starts = np.arange(items - 1) < parts - 1
        rng.shuffle(starts)
        return np.bincount(np.cumsum(np.concatenate([[False], starts])), minlength=parts)

    interleaved_lengths = np.stack([segments(length - noise_tokens, spans), segments(noise_tokens, spans)], axis=1)
    starts = np.cumsum(interleaved_lengths.reshape(-1))[:-1]
    flips = np.zeros(length, np.int8)
    flips[starts] = 1
    return np.cumsum(flips) % 2 == 1


def with_sentinels(tokens: np.ndarray, hidden: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """Tokens with each hidden run replaced by one sentinel."""
    first = hidden & ~np.concatenate([[False], hidden[:-1]])
    marked = np.where(first, sentinels[np.where(first, np.cumsum(first) - 1, 0)], tokens)
    return marked[~(hidden & ~first)]


def padded(rows: list[np.ndarray], fill: int) -> np.ndarray:
    batch = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for index, values in enumerate(rows):
        batch[index, : len(values)] = values
    return batch


def collate(
    documents: list[np.ndarray], mixture: MixtureOfDenoisers, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """One padded batch, an example at a time."""
    sentinels, eos = np.array(INFO.sentinel_ids), np.array([INFO.eos_id])
    inputs, targets = [], []
    for tokens in documents:
        denoiser = mixture.denoisers[rng.choice(len(mixture), p=mixture.proportions)]
        tokens = tokens.astype(np.int64)
        length = len(tokens)
        if denoiser.sequential:
            noise, spans = length - round(length / denoiser.mu), 1
        else:
            noise = min(max(round(length * denoiser.r), 1), length - 1)
            spans = min(max(round(noise / denoiser.mu), 1), length - noise, len(sentinels))
        hidden = noise_mask(length, noise, spans, rng)
        mode = np.array([INFO.mode_ids[denoiser.prefix]])
        inputs.append(np.concatenate([mode, with_sentinels(tokens, hidden, sentinels), eos]))
        targets.append(np.concatenate([_targets(tokens, hidden, sentinels), eos]))
    input_ids, labels = padded(inputs, INFO.pad_id), padded(targets, -100)
    return {"input_ids": input_ids, "attention_mask": (input_ids != INFO.pad_id).astype(np.int64), "labels": labels}


def _targets(tokens: np.ndarray, hidden: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """Each hidden run after its sentinel."""
    first = hidden & ~np.concatenate([[False], hidden[:-1]])
    places = np.flatnonzero(first)
    return np.insert(tokens[hidden], np.cumsum(hidden)[places] - 1, sentinels[: places.size])


def check(mixture: MixtureOfDenoisers, documents: list[np.ndarray]) -> None:
    """Both providers make examples that reconstruct their documents: the comparison is of equals."""
    batch = collate(documents, mixture, np.random.default_rng(0))
    for tokens, ids, mask, labels in zip(documents, batch["input_ids"], batch["attention_mask"], batch["labels"]):
        rebuilt = reconstruct(ids[mask == 1], labels[labels != -100], INFO)
        if not np.array_equal(rebuilt, tokens):
            raise SystemExit("the NumPy collator does not reconstruct its documents")


def measure(name: str, lengths: np.ndarray, tokens_a_round: int, repeats: int) -> list[dict[str, object]]:
    mixture = MixtureOfDenoisers.named("fat5")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder) / "corpus", lengths, rng)
        noise, spans = mixture.tables(1024, len(INFO.sentinel_ids))
        share = np.array(mixture.proportions)[:, None]
        mean_decoder = float((share * (noise + spans + 1)[:, lengths]).sum(0).mean())
        mean_encoder = float((share * (lengths - noise[:, lengths] + spans[:, lengths] + 2)).sum(0).mean())
        encoder_tokens, decoder_tokens = suggest_budgets(mean_encoder, mean_decoder, 16384)
        config = BatchConfig(
            max_tokens=1024, encoder_tokens=encoder_tokens, decoder_tokens=decoder_tokens, packs_per_step=1
        )
        loader = PackedLoader(PieceStream([shards], mixture, INFO, config.max_tokens, seed=0), config)
        batches = iter(loader)
        fills: list[tuple[float, float]] = []
        counts: dict[str, list[int]] = {"fat5": [], "numpy": []}

        def fat5() -> None:
            tokens = 0
            while tokens < tokens_a_round:
                batch = next(batches)
                tokens += batch.tokens
                fills.append((int(batch.cu_seqlens[-1]) / encoder_tokens, batch.num_items / decoder_tokens))
            counts["fat5"].append(tokens)

        documents = _endless(shards)
        check(mixture, [next(documents) for _ in range(BATCH_SIZE)])
        fill_padded: list[float] = []

        def numpy() -> None:
            tokens = 0
            while tokens < tokens_a_round // 20:
                members = [next(documents) for _ in range(BATCH_SIZE)]
                batch = collate(members, mixture, rng)
                tokens += sum(map(len, members))
                fill_padded.append(float(batch["attention_mask"].mean()))
            counts["numpy"].append(tokens)

        providers: dict[str, Callable[[], object]] = {"fat5": fat5, "numpy": numpy}
        seconds = interleaved(providers, repeats=repeats)
        speed = {key: np.array(counts[key][-repeats:]) / seconds[key] for key in providers}
        _reconstructs(loader, next(batches))
    rows = [row(name, key, "useful tokens", speed[key], "tokens/s") for key in providers]
    rows.append(row(name, "fat5 / numpy", "speed", speed["fat5"] / speed["numpy"], "ratio"))
    encoder, decoder = np.array(fills).T
    rows.append(row(name, "fat5", f"encoder fill of {encoder_tokens}", encoder.mean(keepdims=True), "share"))
    rows.append(row(name, "fat5", f"decoder fill of {decoder_tokens}", decoder.mean(keepdims=True), "share"))
    rows.append(row(name, "numpy", "encoder fill", np.mean(fill_padded, keepdims=True), "share"))
    return rows


def _endless(shards: TokenShards) -> Iterator[np.ndarray]:
    while True:
        yield from shards


def _reconstructs(loader: PackedLoader, batch: object) -> None:
    for piece, (inputs, targets) in zip(batch.piece.tolist(), unpack(batch)):  # type: ignore[attr-defined]
        if not np.array_equal(reconstruct(inputs, targets, INFO), loader.stream.tokens(piece)):
            raise SystemExit(f"piece {piece} does not reconstruct")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    paragraphs = np.clip(rng.lognormal(3.86, 0.72, 120_000).astype(np.int64), 2, 1024)
    uniform = rng.integers(50, 1025, 20_000)
    cases = {
        f"paragraphs (mean {paragraphs.mean():.1f})": (paragraphs, 6_000_000),
        "pieces of 1,024": (np.full(8_000, 1024), 16_000_000),
        "uniform 50-1,024": (uniform, 16_000_000),
    }
    rows = [
        line for name, (lengths, tokens) in cases.items() for line in measure(name, lengths, tokens, options.repeats)
    ]
    save("ul2", rows)
    print(json.dumps({"python": sys.version.split()[0]}))


if __name__ == "__main__":
    main()
