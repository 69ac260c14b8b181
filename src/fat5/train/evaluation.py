"""Loss and token accuracy on a fixed validation stream with fixed noise, by denoiser and overall."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fat5.data import PackedBatch
from fat5.train.precision import Precision


@dataclass(frozen=True)
class Score:
    """Mean over target tokens."""

    loss: float
    """Nats a token (cross-entropy alone: no z-loss, no label smoothing)"""
    accuracy: float
    """Share of target tokens whose most likely prediction is right"""
    tokens: int
    """Target tokens"""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one evaluation."""

    overall: Score
    by_denoiser: dict[str, Score]

    def row(self, step: int) -> dict[str, Any]:
        """As a row of metrics.jsonl."""
        by_denoiser = {name: vars(score) for name, score in self.by_denoiser.items()}
        return {"kind": "eval", "step": step, **vars(self.overall), "by_denoiser": by_denoiser}


@torch.no_grad()
def evaluate(
    forward: Callable[..., Any],
    model: nn.Module,
    batches: Iterable[PackedBatch],
    names: Sequence[str],
    precision: Precision,
    before_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Scores a model on packed batches. Sums stay on the device until the end.

    Args:
        forward: the model, or its compiled form.
        model: switched to evaluation meanwhile (no dropout), and back.
        batches: every target token counts once.
        names: of the denoisers that `PackedBatch.denoiser` indexes.
        precision: of the forward pass.
        before_batch: called before each batch; an exception of it ends the evaluation.
    """
    device = precision.device
    sums = torch.zeros(len(names), 3, dtype=torch.float64, device=device)
    denoisers = torch.arange(len(names), device=device)
    training = model.training
    model.eval()
    try:
        for batch in batches:
            before_batch()
            rows = denoiser_of_tokens(batch).to(device)
            inputs = batch.to(device)
            with precision.autocast():
                output = forward(**inputs.model_inputs(), per_token=True)
            counted = (inputs.labels != -100).double()
            values = torch.stack([output.token_loss.double() * counted, output.token_correct * counted, counted], dim=1)
            # A product: index_add_ adds by atomics on a GPU, so the last digits would change from run to run.
            sums += (rows == denoisers[:, None]).double() @ values
    finally:
        model.train(training)
    totals = sums.tolist()
    by_denoiser = {name: _score(total) for name, total in zip(names, totals, strict=True) if total[2]}
    return Evaluation(_score([sum(column) for column in zip(*totals, strict=True)]), by_denoiser)


def denoiser_of_tokens(batch: PackedBatch) -> torch.Tensor:
    """Index of the denoiser that each target token belongs to: int64 (decoder_tokens,); 0 in the empty tail."""
    lengths = batch.decoder_cu_seqlens.diff().long()
    denoisers = torch.repeat_interleave(batch.denoiser.long().clamp_min(0), lengths)
    return nn.functional.pad(denoisers, (0, batch.labels.numel() - denoisers.numel()))


def unigram_entropy(batches: Iterable[PackedBatch]) -> float:
    """Entropy of the target tokens' own frequencies, in nats a token.

    The loss of the best model that knows no context; a model that reads should end well below it.
    """
    targets = torch.cat([batch.labels[batch.labels != -100] for batch in batches])
    counts = torch.bincount(targets).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def _score(total: Sequence[float]) -> Score:
    loss, correct, tokens = total
    return Score(loss / tokens, correct / tokens, int(tokens)) if tokens else Score(math.nan, math.nan, 0)
