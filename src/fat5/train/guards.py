"""The guard of each update: loss and gradient must be finite, and the examples that broke them are put on record."""

import json
from collections.abc import Sequence
from pathlib import Path

from fat5.errors import FAT5Error
from fat5.files import write_atomically

MOST_IN_A_ROW = 10
"""Steps in a row that may be skipped or rewound; more than that, and it is not the data."""


class NonFiniteError(FAT5Error):
    """Loss or gradient of a step was NaN or infinite; the update was not made."""


def dump_examples(
    folder: Path, step: int, pieces: Sequence[Sequence[int]], losses: Sequence[float], grad_norm: float
) -> Path:
    """Writes `nonfinite-step-N.json`, the loss and the piece ids of each micro-batch; returns its path."""
    path = folder / f"nonfinite-step-{step}.json"
    rows = [{"loss": str(loss), "pieces": ids} for loss, ids in zip(losses, pieces, strict=True)]
    content = {"step": step, "grad_norm": str(grad_norm), "micro_batches": rows}
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path
