"""TensorBoard events beside metrics.jsonl; an error in them never stops a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fat5.train.log.metrics import parts

TRAIN_KEYS = (
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "data_wait_fraction",
    "encoder_fill",
    "decoder_fill",
    "mfu",
)


class TensorBoard:
    """Writes rows of metrics.jsonl as scalars.

    Args:
        folder: of the event files.
        step: where the run continues; TensorBoard hides later events of an interrupted part.
        warn: called at the first error; nothing is written after that.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._writer: Any = None
        with self._guarded():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """One row, train or eval."""
        if self._writer is None:
            return
        if row["kind"] == "eval":
            scalars = {"validation/loss": row["loss"], "validation/accuracy": row["accuracy"]}
            part, scores = parts(row)
            scalars |= {f"validation by {part}/{name}": score["loss"] for name, score in scores.items()}
        else:
            scalars = {f"train/{key}": row[key] for key in TRAIN_KEYS if row.get(key) is not None}
        with self._guarded():
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._writer is not None:
            with self._guarded():
                self._writer.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns an error inside into one warning, and the writer off."""
        try:
            yield
        except (OSError, ImportError, ValueError) as error:
            self._writer = None
            self._warn(f"TensorBoard is off: {error}; training goes on")
