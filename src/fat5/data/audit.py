"""The audit of prepared data: what the model will see, measured on its batches, against the specification."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fat5.data.examples import kernels
from fat5.data.examples.batch import BatchConfig, PackedBatch
from fat5.data.examples.denoisers import DenoiserConfig, MixtureOfDenoisers, reconstruct
from fat5.data.examples.loader import Loader
from fat5.data.examples.order import PieceStream, WeightedShards
from fat5.data.examples.packing import fill, pack, suggest_budgets
from fat5.data.examples.padded import unpack
from fat5.data.examples.steps import PackPlan
from fat5.data.shards.token_shards import open_shards
from fat5.data.tokenizer.loading import Tokenizer, load_tokenizer
from fat5.errors import ConfigurationError, TokenizerError, check_whole, check_writable
from fat5.files import naming, write_atomically

RATE_TOLERANCE = 0.05  # relative deviation from mu and r beyond which documents are too short for the specification
DRAWS_SIGMA = 4.0  # standard deviations by which a measured proportion may differ from its own
FERTILITY_TOKENS = 300_000  # raw tokens decoded to count words and bytes
BLOCK = 1024  # positions of the stream resolved at a time
MOST_TOKENS = 1 << 40  # to measure, beyond any corpus
SHOWN_TOKENS = 120  # of each side of an example


@dataclass
class AuditConfig:
    """Shows what the model sees: examples, rates against the specification, lengths, fill, budgets, fertility.

    Args:
        inputs: prepared folders.
        output_dir: folder for audit.json and audit.png.
        weights: relative share of the tokens of each folder; all equal if empty.
        split: train or validation.
        mixture: fat5, ul2, t5, prefix-lm, or a list of {mu, r, max_spans, prefix, proportion}.
        max_tokens: raw tokens of one example.
        encoder_tokens: encoder tokens of a pack.
        decoder_tokens: decoder tokens of a pack; 0 takes what goes with encoder_tokens.
        window: examples the packing looks ahead to.
        tokens: raw tokens to measure.
        examples: examples shown of each denoiser.
        seed: of order and noise.
    """

    inputs: list[str] = field(default_factory=list)
    output_dir: str = "audit"
    weights: list[float] = field(default_factory=list)
    split: str = "train"
    mixture: str | list[DenoiserConfig] = "fat5"
    max_tokens: int = 1024
    encoder_tokens: int = 16384
    decoder_tokens: int = 0
    window: int = 1024
    tokens: int = 1_000_000
    examples: int = 1
    seed: int = 0


def audit(config: AuditConfig) -> dict[str, Any]:
    """Measures prepared data and writes `audit.json` and `audit.png` to `config.output_dir`; returns what it wrote.

    Raises:
        ConfigurationError, DataError, TokenizerError: what cannot be audited, and why.
    """
    sources, tokenizer = _open(config)
    mixture = MixtureOfDenoisers.of(config.mixture)
    stream = PieceStream(sources, mixture, tokenizer.info, config.max_tokens, config.seed)
    measured = _measure(config, stream)
    means = measured["encoder"].mean(), measured["decoder"].mean()
    suggested = suggest_budgets(*means, config.encoder_tokens)
    shapes = BatchConfig(
        max_tokens=config.max_tokens,
        encoder_tokens=config.encoder_tokens,
        decoder_tokens=config.decoder_tokens or suggested[1],
        packs_per_step=1,
        window=config.window,
    )
    seen = _Seen(stream, tokenizer, config.examples, config.window)
    for batch in Loader[PackedBatch](PackPlan(stream, shapes, 0, 1)):
        seen.add(batch)
        if seen.raw_tokens >= config.tokens:
            break
    report = {
        "corpora": _corpora(stream, seen),
        "mixture": seen.rows(),
        "examples": sum(len(lengths) for lengths in seen.encoder),
        "tokens": seen.raw_tokens,
        "tokens_dropped": sum(stream.short_tokens),
        "reconstructed": seen.reconstructed,
        "budgets": {
            "encoder_tokens": shapes.encoder_tokens,
            "decoder_tokens": shapes.decoder_tokens,
            "encoder_fill": float(np.mean(seen.encoder_fill)),
            "decoder_fill": float(np.mean(seen.decoder_fill)),
            "examples_per_pack": float(np.mean(seen.counts)),
        },
        "suggested": _suggest(measured, suggested, config.window),
        "sentinels": {"available": len(tokenizer.info.sentinel_ids), "used": max(seen.most_sentinels)},
        "tokenizer": _fertility(stream, tokenizer),
        "notes": stream.notes(),
        "shown": seen.shown,
    }
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "audit.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    with naming(folder / "audit.png"):
        _draw(mixture.names(), seen.encoder, seen.decoder, np.concatenate(seen.raw), folder / "audit.png")
    return report


class _Seen:
    """Running measures over packed batches."""

    def __init__(self, stream: PieceStream, tokenizer: Tokenizer, examples: int, window: int) -> None:
        self.stream, self.tokenizer, self.examples, self.window = stream, tokenizer, examples, window
        denoisers = len(stream.mixture)
        self._is_sentinel = np.zeros(tokenizer.info.vocab_size, bool)
        self._is_sentinel[list(tokenizer.info.sentinel_ids)] = True
        self.encoder: list[list[int]] = [[] for _ in range(denoisers)]
        self.decoder: list[list[int]] = [[] for _ in range(denoisers)]
        self.raw: list[np.ndarray] = []
        self.by_source = np.zeros(len(stream.sources), np.int64)
        self.noise, self.kept, self.spans, self.limited, self.broken = np.zeros((5, denoisers), np.int64)
        self.most_sentinels = [0] * denoisers
        self.encoder_fill: list[float] = []
        self.decoder_fill: list[float] = []
        self.counts: list[int] = []
        self.raw_tokens = self.reconstructed = 0
        self.shown: list[dict[str, Any]] = []

    def add(self, batch: PackedBatch) -> None:
        """Measures one batch: every example is taken apart again."""
        count = batch.num_examples
        self.encoder_fill.append(batch.encoder_fill)
        self.decoder_fill.append(batch.decoder_fill)
        self.counts.append(count)
        self.raw_tokens += batch.tokens
        denoiser = batch.denoiser[:count].numpy().astype(np.int64)
        starts = batch.decoder_cu_seqlens[:count].numpy().astype(np.int64)
        labels = batch.labels[: batch.num_items].numpy()
        spans = np.add.reduceat(self._is_sentinel[labels].astype(np.int64), starts)
        encoder = batch.cu_seqlens.diff()[:count].numpy().astype(np.int64)
        decoder = batch.decoder_cu_seqlens.diff()[:count].numpy().astype(np.int64)
        noise = decoder - spans - 1
        kept = encoder - spans - 1 - (self.stream.tables.mode[denoiser] >= 0)
        raw = noise + kept
        self.raw.append(raw)
        for total, values in ((self.noise, noise), (self.kept, kept), (self.spans, spans)):
            np.add.at(total, denoiser, values)
        np.add.at(self.by_source, batch.piece[:count].numpy() >> kernels.PIECE_BITS, raw)
        for index, rule in enumerate(self.stream.mixture.denoisers):
            mine = denoiser == index
            self.encoder[index] += encoder[mine].tolist()
            self.decoder[index] += decoder[mine].tolist()
            self.limited[index] += int((rule.wanted_spans(raw[mine]) > spans[mine]).sum())
            self.most_sentinels[index] = max(self.most_sentinels[index], int(spans[mine].max(initial=0)))
        self._take_apart(batch, noise, spans)

    def _take_apart(self, batch: PackedBatch, noise: np.ndarray, spans: np.ndarray) -> None:
        info, mixture = self.tokenizer.info, self.stream.mixture
        rows = zip(unpack(batch), batch.piece.tolist(), batch.denoiser.tolist(), noise.tolist(), spans.tolist())
        for (inputs, targets), piece, denoiser, masked, marked in rows:
            tokens = self.stream.tokens(piece)
            whole = np.array_equal(reconstruct(inputs, targets, info), tokens)
            self.reconstructed += whole
            asked = mixture.denoisers[denoiser].spans(len(tokens), len(info.sentinel_ids))
            self.broken[denoiser] += not whole or asked != (masked, marked)
            if sum(row["denoiser"] == denoiser for row in self.shown) < self.examples:
                self.shown.append(
                    {
                        "denoiser": denoiser,
                        "name": mixture.names()[denoiser],
                        "piece": piece,
                        "inputs": self._text(inputs),
                        "targets": self._text(targets),
                    }
                )

    def _text(self, ids: np.ndarray) -> str:
        cut = ids[:SHOWN_TOKENS]
        return self.tokenizer.decode(cut.tolist()) + (" …" if len(ids) > SHOWN_TOKENS else "")

    def rows(self) -> list[dict[str, Any]]:
        """Each denoiser against its specification. A verdict is

        - "FAIL" where an example breaks the rule or the proportion is off by more than chance;
        - "short documents" where every example obeys the rule, but mu or r cannot be met at these lengths;
        - "ok" otherwise.
        """
        rows = []
        drawn = np.array([len(lengths) for lengths in self.encoder])
        for index, (rule, proportion) in enumerate(zip(self.stream.mixture.denoisers, self.stream.mixture.proportions)):
            wanted = 1 - 1 / rule.mu if rule.sequential else rule.r
            single = rule.max_spans == 1
            rate = self.noise[index] / max(self.noise[index] + self.kept[index], 1)
            span = self.noise[index] / max(self.spans[index], 1)
            share = drawn[index] / drawn.sum()
            sigma = np.sqrt(proportion * (1 - proportion) / drawn.sum())
            deviation = {"r": rate / wanted - 1} | ({} if single else {"mu": span / rule.mu - 1})
            verdict = "ok" if all(abs(off) <= RATE_TOLERANCE for off in deviation.values()) else "short documents"
            waiting = self.window / drawn.sum()  # those still in the window may be of one kind
            if self.broken[index] or abs(share - proportion) > DRAWS_SIGMA * sigma + waiting:
                verdict = "FAIL"
            rows.append(
                {
                    "name": self.stream.mixture.names()[index],
                    "examples": int(drawn[index]),
                    "proportion": {"asked": proportion, "measured": float(share), "sigma": float(sigma)},
                    "corruption_rate": {"asked": wanted, "measured": float(rate)},
                    "mean_span_length": {"asked": None if single else rule.mu, "measured": float(span)},
                    "deviation": {key: float(off) for key, off in deviation.items()},
                    "sentinels_used": self.most_sentinels[index],
                    "limited_by_sentinels": int(self.limited[index]),
                    "broken": int(self.broken[index]),
                    "verdict": verdict,
                }
            )
        return rows


def _open(config: AuditConfig) -> tuple[list[WeightedShards], Tokenizer]:
    if not config.inputs:
        raise ConfigurationError(
            "no prepared folder is given", where="inputs", hint="Try `fat5 audit DIR --output_dir OUT`"
        )
    weights = config.weights or [1.0] * len(config.inputs)
    if len(weights) != len(config.inputs):
        raise ConfigurationError(f"{len(weights)} weights for {len(config.inputs)} folders", where="weights")
    check_whole(config.tokens, "tokens", most=MOST_TOKENS)
    check_whole(config.examples, "examples", least=0)
    check_whole(config.encoder_tokens, "encoder_tokens")
    check_writable(config.output_dir, folder=True, key="output_dir")
    shards = [open_shards(folder, config.split) for folder in config.inputs]
    tokenizers = [load_tokenizer(Path(folder) / "tokenizer") for folder in config.inputs]
    for folder, tokenizer in zip(config.inputs, tokenizers):
        if tokenizer.info.sha256 != tokenizers[0].info.sha256:
            raise TokenizerError(
                f"prepared with another tokenizer than {config.inputs[0]}", where=folder, hint="Prepare both with one"
            )
    return [WeightedShards(*pair) for pair in zip(shards, weights)], tokenizers[0]


def _measure(config: AuditConfig, stream: PieceStream) -> dict[str, np.ndarray]:
    """Encoder and decoder lengths of the first examples of the stream that hold `config.tokens`; reads no token."""
    parts: list[kernels.Examples] = []
    total, position = 0, 0
    while total < config.tokens:
        parts.append(stream.resolve(np.arange(position, position + BLOCK)))
        total, position = total + int(parts[-1].length.sum()), position + BLOCK
    return {side: np.concatenate([getattr(part, side) for part in parts]) for side in ("encoder", "decoder")}


def _suggest(measured: dict[str, np.ndarray], budgets: tuple[int, int], window: int) -> dict[str, Any]:
    """The suggested budgets and the fill they give on the measured lengths."""
    encoder, decoder = measured["encoder"], measured["decoder"]
    if encoder.max() > budgets[0] or decoder.max() > budgets[1]:
        filled: Sequence[float | None] = (None, None)
    else:
        packs = pack(encoder, decoder, *budgets, window=window)
        steady = packs[: max(1, len(packs) - 1 - window // max(1, len(packs[0])))]
        filled = (fill(steady, encoder, budgets[0]), fill(steady, decoder, budgets[1]))
    return {
        "encoder_tokens": budgets[0],
        "decoder_tokens": budgets[1],
        "decoder_per_encoder": float(decoder.mean() / encoder.mean()),
        "encoder_fill": filled[0],
        "decoder_fill": filled[1],
    }


def _corpora(stream: PieceStream, seen: _Seen) -> list[dict[str, Any]]:
    total = sum(source.weight for source in stream.sources)
    return [
        {
            "folder": str(source.shards.folder),
            "name": source.shards.manifest.name,
            "documents": source.shards.num_documents,
            "tokens": source.shards.num_tokens,
            "pieces": stream.num_pieces[index],
            "short_documents": stream.short_documents[index],
            "cut_documents": stream.cut_documents[index],
            "share_asked": source.weight / total,
            "tokens_seen": int(seen.by_source[index]),
            "share_seen": float(seen.by_source[index] / seen.by_source.sum()),
        }
        for index, source in enumerate(stream.sources)
    ]


def _fertility(stream: PieceStream, tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokens per word (white space between words) and per byte, and the share of unknown tokens, on decoded pieces."""
    tokens = words = size = unknown = 0
    for piece in _pieces(stream):
        ids = stream.tokens(piece)
        text = tokenizer.decode(ids.tolist())
        tokens += len(ids)
        words += len(text.split())
        size += len(text.encode("utf-8", "surrogatepass"))
        unknown += int((ids == tokenizer.info.unk_id).sum())
        if tokens >= FERTILITY_TOKENS:
            break
    return {
        "vocab_size": tokenizer.info.vocab_size,
        "tokens_measured": tokens,
        "tokens_per_word": tokens / max(words, 1),
        "tokens_per_byte": tokens / max(size, 1),
        "unknown_rate": unknown / max(tokens, 1),
    }


def _pieces(stream: PieceStream) -> Iterator[int]:
    """The pieces of the stream in order, as many as the sources have; resolved a block at a time."""
    total = sum(stream.num_pieces)
    for start in range(0, total, BLOCK):
        yield from stream.resolve(np.arange(start, min(start + BLOCK, total))).piece.tolist()


def _draw(
    names: Sequence[str],
    encoder: Sequence[Sequence[int]],
    decoder: Sequence[Sequence[int]],
    raw: np.ndarray,
    path: Path,
) -> None:
    """Draws length histograms to a PNG: pieces; encoder and decoder sides by denoiser, stacked.

    Args:
        names: of the denoisers.
        encoder, decoder: lengths of each denoiser's examples.
        raw: (N,) raw tokens of each piece.
        path: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    pieces, inputs, targets = figure.subplots(1, 3)
    pieces.hist(raw, bins=60, color="0.4")
    pieces.set_title(f"pieces: {raw.size:,}, mean {raw.mean():.0f} tokens")
    for axes, sides, title in ((inputs, encoder, "encoder side"), (targets, decoder, "decoder side")):
        lengths = np.concatenate([np.asarray(side, np.int64) for side in sides])
        axes.hist(sides, bins=60, stacked=True, label=names)
        axes.set_title(f"{title}, mean {lengths.mean():.0f} tokens")
    targets.legend(fontsize="small")
    for axes in (pieces, inputs, targets):
        axes.set_xlabel("tokens")
        axes.set_ylabel("examples")
    figure.savefig(path, dpi=110)
