"""Loss and token accuracy on a fixed validation stream, overall and by part."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fat5.data import PackedBatch
from fat5.train.precision import Precision
from fat5.train.signals import StopAsked
from fat5.train.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Scorer:
    """A model as it is scored."""

    model: Any
    """Switched to evaluation mode (no dropout), and back at the end"""
    precision: Precision
    """Of the forward pass"""
    world: World
    forward: Callable[..., Any]
    """The model, or its compiled form"""
    before_batch: Callable[[], None] = lambda: None
    """Called before each batch, by all processes; an exception from it ends the evaluation"""
    is_asked_to_stop: Callable[[], bool] = lambda: False
    """Whether a signal asked this process to stop"""
    gathered: Callable[[], tuple[Any, Any]] | None = None
    """Model and forward with whole weights in the main process, if the processes divide them; called by all"""

    def alone(self) -> "Scorer":
        """The same for work of the main process alone; before a batch it raises StopAsked after a stop signal. All
        processes call this.
        """
        if self.world.size == 1:
            return self
        model, forward = (self.model, self.forward) if self.gathered is None else self.gathered()
        return replace(self, model=model, forward=forward, world=self.world.alone(), before_batch=self._stop_if_asked)

    def on_main(self, work: Callable[["Scorer"], T]) -> T:
        """What `work` makes in the main process, as JSON, for all of them: the others wait. A stop signal ends it."""
        if self.world.size == 1:
            return work(self)
        made: list[T] | None = None
        alone = self.alone()
        if self.world.is_main:
            with suppress(StopAsked):
                made = [work(alone)]
        made = self.world.broadcast(made)
        if made is None:
            self.before_batch()  # where all leave together
            raise RuntimeError("a stop signal was not taken up")
        return made[0]

    def _stop_if_asked(self) -> None:
        if self.is_asked_to_stop():
            raise StopAsked


@torch.no_grad()
def evaluate(
    scorer: Scorer, batches: Iterable[tuple[PackedBatch, Tensor]], names: Sequence[str], part: str
) -> dict[str, Any]:
    """Scores a model on packed batches. Sums stay on the device until the end.

    Args:
        batches: each with the part of every example, an index into `names`: (N,). Every target token counts once.
        part: what the names are names of, a noun.

    Returns:
        As in metrics.jsonl: loss (nats a target token; cross-entropy alone: no z-loss, no label smoothing), accuracy
        (share of target tokens whose most likely prediction is right), tokens, and the same by name in `by_{part}`.
    """
    model, precision, device = scorer.model, scorer.precision, scorer.precision.device
    sums = torch.zeros(len(names), 3, dtype=torch.float64, device=device)
    parts = torch.arange(len(names), device=device)
    training = model.training
    model.eval()
    try:
        for batch, index in batches:
            scorer.before_batch()
            rows = part_of_tokens(batch, index).to(device)
            inputs = batch.to(device)
            with precision.autocast():
                output = scorer.forward(**inputs.model_inputs(), per_token=True)
            counted = (inputs.labels != -100).double()
            values = torch.stack([output.token_loss.double() * counted, output.token_correct * counted, counted], dim=1)
            # A product: index_add_ adds by atomics on a GPU, so the last digits would change from run to run.
            sums += (rows == parts[:, None]).double() @ values
    finally:
        model.train(training)
    totals = scorer.world.all_sum(sums).tolist()
    by_name = {name: _score(total) for name, total in zip(names, totals, strict=True) if total[2]}
    return _score([sum(column) for column in zip(*totals, strict=True)]) | {f"by_{part}": by_name}


def part_of_tokens(batch: PackedBatch, index: Tensor) -> Tensor:
    """The part of each target token, from that of its example: int64 (decoder_tokens,); 0 in the empty tail."""
    lengths = batch.decoder_cu_seqlens.diff().long()
    of_tokens = torch.repeat_interleave(index.long().clamp_min(0), lengths)
    return nn.functional.pad(of_tokens, (0, batch.labels.numel() - of_tokens.numel()))


def unigram_entropy(batches: Iterable[PackedBatch], world: World | None = None) -> float:
    """Entropy of the target tokens' own frequencies, in nats a token, over the batches of all processes of a world.

    The loss of the best model that knows no context; a model that reads should end well below it.
    """
    targets = torch.cat([batch.labels[batch.labels != -100] for batch in batches])
    counts = torch.bincount(targets)
    if world is not None:
        counts = world.all_sum(nn.functional.pad(counts, (0, max(world.gather(len(counts))) - len(counts))))
    counts = counts.double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def _score(total: Sequence[float]) -> dict[str, Any]:
    loss, correct, tokens = total
    if not tokens:
        return {"loss": math.nan, "accuracy": math.nan, "tokens": 0}
    return {"loss": loss / tokens, "accuracy": correct / tokens, "tokens": int(tokens)}
