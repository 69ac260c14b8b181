"""The audit of prepared data: the batches a model would see, measured against the specification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fat5.data.examples import kernels
from fat5.data.examples.batch import PackedBatch
from fat5.data.examples.config import AuditConfig, BatchConfig
from fat5.data.examples.denoisers import MixtureOfDenoisers, reconstruct
from fat5.data.examples.loader import PackedLoader
from fat5.data.examples.order import PieceStream, WeightedShards, open_weighted
from fat5.data.examples.packing import fill, pack, suggest_budgets
from fat5.data.examples.padded import unpack
from fat5.data.tokenizer.loading import Tokenizer, TokenizerInfo, load_tokenizer
from fat5.errors import ConfigurationError, check_whole, check_writable
from fat5.files import naming, write_json

RATE_TOLERANCE = 0.05  # relative deviation from mu and r beyond which documents are too short for the specification
DRAWS_SIGMA = 4.0  # standard deviations by which a measured proportion may differ from its own
FERTILITY_TOKENS = 300_000  # raw tokens decoded to count words and bytes
BLOCK = 1024  # positions of the stream resolved at a time
MOST_TOKENS = 1 << 40  # to measure, beyond any corpus
SHOWN_TOKENS = 120  # of each side of an example


def audit(config: AuditConfig) -> dict[str, Any]:
    """Measures prepared data and writes `audit.json` and `audit.png` to `config.output_dir`; returns what it wrote.

    Raises:
        ConfigurationError, DataError, TokenizerError: the data cannot be audited.
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
    info = tokenizer.info
    parts: list[_Columns] = []
    shown: list[dict[str, Any]] = []
    tokens = 0
    for batch in PackedLoader(stream, shapes):
        parts.append(_take_apart(batch, stream, info))
        _show(batch, stream, tokenizer, config.examples, shown)
        tokens += batch.tokens
        if tokens >= config.tokens:
            break
    columns = _Columns(*map(np.concatenate, zip(*parts)))
    count = int(columns.piece.size)
    report = {
        "corpora": _corpora(stream, columns),
        "mixture": _mixture(stream, columns, config.window),
        "examples": count,
        "tokens": tokens,
        "tokens_dropped": sum(stream.short_tokens),
        "reconstructed": int(columns.whole.sum()),
        "budgets": {
            "encoder_tokens": shapes.encoder_tokens,
            "decoder_tokens": shapes.decoder_tokens,
            "encoder_fill": float(columns.encoder.sum() / (len(parts) * shapes.encoder_tokens)),
            "decoder_fill": float(columns.decoder.sum() / (len(parts) * shapes.decoder_tokens)),
            "examples_per_pack": count / len(parts),
        },
        "suggested": _suggest(measured, suggested, config.window),
        "sentinels": {"available": len(info.sentinel_ids), "used": int(columns.spans.max(initial=0))},
        "tokenizer": _fertility(stream, tokenizer),
        "notes": stream.notes(),
        "shown": shown,
    }
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "audit.json", report)
    with naming(folder / "audit.png"):
        _draw(mixture.names(), columns, folder / "audit.png")
    return report


class _Columns(NamedTuple):
    """The examples that were measured: int64 arrays of one length."""

    denoiser: np.ndarray
    piece: np.ndarray
    encoder: np.ndarray  # tokens of each side
    decoder: np.ndarray
    noise: np.ndarray  # raw tokens that are masked, and that are kept
    kept: np.ndarray
    spans: np.ndarray
    whole: np.ndarray  # 1 if inputs and targets give the document back
    lawful: np.ndarray  # 1 if it also has the noise and spans that its denoiser asks for

    @property
    def raw(self) -> np.ndarray:
        """Raw tokens of each example."""
        return self.noise + self.kept


def _take_apart(batch: PackedBatch, stream: PieceStream, info: TokenizerInfo) -> _Columns:
    """The examples of a batch, each compared with its document and with what its denoiser asks for."""
    count = batch.num_examples
    denoiser, piece = batch.denoiser[:count].numpy().astype(np.int64), batch.piece[:count].numpy()
    starts = batch.decoder_cu_seqlens[:count].numpy().astype(np.int64)
    is_sentinel = np.isin(batch.labels[: batch.num_items].numpy(), info.sentinel_ids)
    spans = np.add.reduceat(is_sentinel.astype(np.int64), starts)
    encoder = batch.cu_seqlens.diff()[:count].numpy().astype(np.int64)
    decoder = batch.decoder_cu_seqlens.diff()[:count].numpy().astype(np.int64)
    noise = decoder - spans - 1
    kept = encoder - spans - 1 - (stream.tables.mode[denoiser] >= 0)
    whole, lawful = np.zeros((2, count), np.int64)
    for n, (inputs, targets) in enumerate(unpack(batch)):
        tokens = stream.tokens(int(piece[n]))
        whole[n] = np.array_equal(reconstruct(inputs, targets, info), tokens)
        asked = stream.mixture.denoisers[denoiser[n]].spans(len(tokens), len(info.sentinel_ids))
        lawful[n] = whole[n] and asked == (noise[n], spans[n])
    return _Columns(denoiser, piece, encoder, decoder, noise, kept, spans, whole, lawful)


def _show(
    batch: PackedBatch, stream: PieceStream, tokenizer: Tokenizer, most: int, shown: list[dict[str, Any]]
) -> None:
    """Adds examples of a batch as text, until `most` of each denoiser are shown."""
    for denoiser, piece, sides in zip(batch.denoiser.tolist(), batch.piece.tolist(), unpack(batch)):
        if sum(row["denoiser"] == denoiser for row in shown) < most:
            inputs, targets = (
                tokenizer.decode(ids[:SHOWN_TOKENS].tolist()) + (" …" if len(ids) > SHOWN_TOKENS else "")
                for ids in sides
            )
            name = stream.mixture.names()[denoiser]
            shown.append({"denoiser": denoiser, "name": name, "piece": piece, "inputs": inputs, "targets": targets})


def _mixture(stream: PieceStream, columns: _Columns, window: int) -> list[dict[str, Any]]:
    """Each denoiser against its specification. A verdict is

    - "FAIL" if an example breaks the rule, or the proportion is off by more than chance;
    - "short documents" if every example obeys the rule, but mu or r cannot be met at these lengths;
    - "ok" otherwise.
    """
    rows = []
    mixture, total = stream.mixture, columns.piece.size
    for index, (name, rule, asked) in enumerate(zip(mixture.names(), mixture.denoisers, mixture.proportions)):
        mine = _Columns(*(column[columns.denoiser == index] for column in columns))
        count, noise = mine.piece.size, mine.noise.sum()
        wanted = 1 - 1 / rule.mu if rule.sequential else rule.r
        single = rule.max_spans == 1
        rate = noise / max(mine.raw.sum(), 1)
        span = noise / max(mine.spans.sum(), 1)
        share, sigma = count / total, np.sqrt(asked * (1 - asked) / total)
        deviation = {"r": rate / wanted - 1} | ({} if single else {"mu": span / rule.mu - 1})
        broken = int(count - mine.lawful.sum())
        verdict = "ok" if all(abs(off) <= RATE_TOLERANCE for off in deviation.values()) else "short documents"
        waiting = window / total  # those still in the window may be of one kind
        if broken or abs(share - asked) > DRAWS_SIGMA * sigma + waiting:
            verdict = "FAIL"
        rows.append(
            {
                "name": name,
                "examples": count,
                "proportion": {"asked": asked, "measured": share, "sigma": float(sigma)},
                "corruption_rate": {"asked": wanted, "measured": float(rate)},
                "mean_span_length": {"asked": None if single else rule.mu, "measured": float(span)},
                "deviation": {key: float(off) for key, off in deviation.items()},
                "sentinels_used": int(mine.spans.max(initial=0)),
                "limited_by_sentinels": int((rule.wanted_spans(mine.raw) > mine.spans).sum()),
                "broken": broken,
                "verdict": verdict,
            }
        )
    return rows


def _open(config: AuditConfig) -> tuple[list[WeightedShards], Tokenizer]:
    if not config.inputs:
        raise ConfigurationError(
            "no prepared folder is given", where="inputs", hint="Try `fat5 audit DIR --output_dir OUT`"
        )
    check_whole(config.tokens, "tokens", most=MOST_TOKENS)
    check_whole(config.examples, "examples", least=0)
    check_whole(config.encoder_tokens, "encoder_tokens")
    check_writable(config.output_dir, folder=True, key="output_dir")
    sources = open_weighted(config.inputs, config.weights, config.split)
    return sources, load_tokenizer(Path(config.inputs[0]) / "tokenizer")


def _measure(config: AuditConfig, stream: PieceStream) -> dict[str, np.ndarray]:
    """Encoder and decoder lengths of the first examples, `config.tokens` raw tokens of them; reads no token."""
    parts: list[kernels.Examples] = []
    total = 0
    while total < config.tokens:
        parts.append(stream.resolve(np.arange(BLOCK) + BLOCK * len(parts)))
        total += int(parts[-1].length.sum())
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


def _corpora(stream: PieceStream, columns: _Columns) -> list[dict[str, Any]]:
    total = sum(source.weight for source in stream.sources)
    seen = np.bincount(columns.piece >> kernels.PIECE_BITS, columns.raw, len(stream.sources))
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
            "tokens_seen": int(seen[index]),
            "share_seen": float(seen[index] / seen.sum()),
        }
        for index, source in enumerate(stream.sources)
    ]


def _fertility(stream: PieceStream, tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokens per word (white space between words) and per byte, and the share of unknown tokens, on decoded pieces."""
    tokens = words = size = unknown = 0
    for position in range(sum(stream.num_pieces)):
        ids = stream.tokens(int(stream.resolve(np.array([position])).piece[0]))
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


def _draw(names: Sequence[str], columns: _Columns, path: Path) -> None:
    """Draws length histograms to a PNG: pieces; encoder and decoder sides, stacked by denoiser."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    pieces, inputs, targets = figure.subplots(1, 3)
    pieces.hist(columns.raw, bins=60, color="0.4")
    pieces.set_title(f"pieces: {columns.raw.size:,}, mean {columns.raw.mean():.0f} tokens")
    for axes, lengths, title in ((inputs, columns.encoder, "encoder side"), (targets, columns.decoder, "decoder side")):
        sides = [lengths[columns.denoiser == index] for index in range(len(names))]
        axes.hist(sides, bins=60, stacked=True, label=names)
        axes.set_title(f"{title}, mean {lengths.mean():.0f} tokens")
    targets.legend(fontsize="small")
    for axes in (pieces, inputs, targets):
        axes.set_xlabel("tokens")
        axes.set_ylabel("examples")
    figure.savefig(path, dpi=110)
