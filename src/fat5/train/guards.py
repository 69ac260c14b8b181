"""The guard of each update: loss and gradient must be finite, and the examples that broke them are put on record."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fat5.data import PackedBatch
from fat5.errors import FAT5Error
from fat5.files import write_atomically

MOST_IN_A_ROW = 10
"""Steps in a row that may be skipped or rewound; more than that, and it is not the data."""


class NonFiniteError(FAT5Error):
    """Loss or gradient of a step was NaN or infinite; the update was not made."""


@dataclass(frozen=True)
class StepRecord:
    """What was in a step: the piece ids of each micro-batch."""

    step: int
    pieces: list[list[int]]

    @classmethod
    def of(cls, step: int, batches: Sequence[PackedBatch]) -> "StepRecord":
        """Takes the ids out of the batches of a step."""
        return cls(step, [batch.piece[: batch.num_examples].tolist() for batch in batches])


def dump_examples(folder: Path, record: StepRecord, losses: Sequence[float], grad_norm: float) -> Path:
    """Writes `nonfinite-step-N.json`: the sum of losses and the piece ids of each micro-batch.

    Returns:
        The file's path.
    """
    path = folder / f"nonfinite-step-{record.step}.json"
    rows: list[dict[str, Any]] = [
        {"loss": str(loss), "pieces": pieces} for loss, pieces in zip(losses, record.pieces, strict=True)
    ]
    content = {"step": record.step, "grad_norm": str(grad_norm), "micro_batches": rows}
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path
