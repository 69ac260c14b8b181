"""The training losses of models with a head, on packed examples, in the form that the trainer expects of any model."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fat5.model import PackedLMOutput


@dataclass
class HeadOutput(PackedLMOutput):
    """What a head gives on packed examples.

    Args:
        logits: (N, C) of examples, or (T, C) of tokens; start and end logits of answers, (T, 2).
    """

    logits: Tensor | None = None


class HeadObjective(nn.Module):
    """A model with a head and the loss of its task. Forward takes what `FAT5ForConditionalGeneration` takes packed.

    Args:
        kind: classification, regression, entities or answers, for which the model has the head.
        weights: of the classes.
        label_smoothing: share of each target spread over all classes.
    """

    weights: Tensor | None

    def __init__(self, model: Any, kind: str, weights: list[float] | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.kind, self.label_smoothing = model, kind, label_smoothing
        held = None if weights is None else torch.tensor(weights, device=next(model.parameters()).device)
        self.register_buffer("weights", held, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        labels: Tensor,
        decoder_cu_seqlens: Tensor,
        decoder_max_seqlen: int,
        num_items_in_batch: Tensor | int | None = None,
        per_token: bool = False,
    ) -> HeadOutput:
        """The loss of packed examples, a sum divided by `num_items_in_batch` (or the number of targets).

        Args:
            input_ids: int64 (T,). cu_seqlens: int32 (N+1,). max_seqlen: bounds the examples' lengths.
            labels: (U,), a class or number for each example, a tag for each token (U = T), or two places for each
                example; -100 does not count.
            per_token: also give token_loss and token_correct (U,), without weights and smoothing.
        """
        output = self.model(input_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        if self.kind == "answers":
            pair = torch.stack([output.start_logits, output.end_logits], dim=-1)
            rows = rows_of(pair.float(), cu_seqlens, max_seqlen)
            logits = pair
            scores = rows.transpose(1, 2).flatten(0, 1)  # (2N, L): start and end of each example
        else:
            logits = output.logits
            scores = logits.float()
        wanted = labels[: len(scores)]
        losses = self._losses(scores, wanted, plain=False)
        items = (wanted != -100).sum() if num_items_in_batch is None else num_items_in_batch
        result = HeadOutput(loss=losses.sum() / items, logits=logits)
        if per_token:
            room = (0, len(labels) - len(scores))
            result["token_loss"] = F.pad(self._losses(scores, wanted, plain=True), room)
            right = scores.argmax(dim=-1) == wanted if self.kind != "regression" else torch.zeros_like(wanted).bool()
            result["token_correct"] = F.pad(right, room)
        return result

    def _losses(self, scores: Tensor, wanted: Tensor, plain: bool) -> Tensor:
        """The loss of each target, 0 where it is -100."""
        if self.kind == "regression":
            return torch.where(wanted == -100, 0.0, (scores[:, 0] - wanted) ** 2)
        if plain:
            return F.cross_entropy(scores, wanted, reduction="none")
        smoothing = self.label_smoothing
        return F.cross_entropy(scores, wanted, weight=self.weights, label_smoothing=smoothing, reduction="none")


def rows_of(values: Tensor, cu_seqlens: Tensor, length: int) -> Tensor:
    """Packed values (T, C) as one row an example (N, length, C); behind an example's end the least float32.

    No value is read twice, so that the gradient is the same in every run.
    """
    place = torch.arange(length, device=values.device)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
    inside = place < lengths[:, None]
    index = (starts[:, None] + place).clamp(max=len(values) - 1)
    rows = values[index]
    return torch.where(inside[..., None], rows, torch.finfo(torch.float32).min)
