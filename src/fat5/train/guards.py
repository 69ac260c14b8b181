"""The guard of each update: loss and gradient must be finite, and the examples that broke them are put on record."""

import json
from collections.abc import Sequence
from pathlib import Path

from fat5.errors import FAT5Error
from fat5.files import write_atomically
from fat5.train.world import World

MOST_IN_A_ROW = 10
"""Steps in a row that may be skipped or rewound; more than that, and it is not the data."""


class NonFiniteError(FAT5Error):
    """Loss or gradient of a step was NaN or infinite; the update was not made."""


def dump_examples(
    folder: Path, step: int, pieces: Sequence[Sequence[int]], losses: Sequence[float], grad_norm: float, world: World
) -> Path:
    """Writes `nonfinite-step-N.json`, the loss and the piece ids of each micro-batch, of all processes in the order of
    their ranks; returns its path.
    """
    path = folder / f"nonfinite-step-{step}.json"
    own = [{"loss": str(loss), "pieces": ids} for loss, ids in zip(losses, pieces, strict=True)]
    rows = [
        row | ({"rank": rank} if world.size > 1 else {}) for rank, some in enumerate(world.gather(own)) for row in some
    ]
    if not world.is_main:
        return path
    content = {"step": step, "grad_norm": str(grad_norm), "micro_batches": rows}
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path
