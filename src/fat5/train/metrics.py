"""metrics.jsonl, the record of truth: one JSON object a line, and what a resumed run does with its tail."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fat5.errors import DataError

TIMES = ("seconds", "tokens_per_second", "data_wait_fraction", "mfu")
"""Keys that measure the machine; all others are equal in two runs of one configuration."""

ROW_KEYS = {
    "train": ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"),
    "eval": ("step", "loss", "accuracy", "by_denoiser"),
}
"""Kind of row → keys that every such row has."""


class MetricsLog:
    """Appends rows to a JSON-lines file.

    A full log disk stops the rows, never the run: the failure is told once, through `on_failure`.

    Args:
        path: the file, appended to.
        on_failure: called with the error's text when a row could not be written, the first time in a row of failures.
    """

    def __init__(self, path: Path, on_failure: Any = None) -> None:
        self.path = path
        self._on_failure = on_failure
        self._failing = False

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row, whole or not at all."""
        line = (json.dumps(row, allow_nan=True, ensure_ascii=False) + "\n").encode()
        try:
            with open(self.path, "ab") as file:
                start = file.tell()
                try:
                    file.write(line)
                    file.flush()
                except OSError:
                    file.truncate(start)
                    raise
        except OSError as error:
            if not self._failing and self._on_failure is not None:
                self._on_failure(f"{self.path.name} cannot be written ({error.strerror}); training goes on")
            self._failing = True
        else:
            self._failing = False

    def flush_to_disk(self) -> None:
        """Makes the rows survive a power cut; called before a checkpoint that relies on them."""
        if self.path.exists():
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def rewind(self, step: int, discarded: Path | None = None) -> int:
        """Cuts off the rows after `step`, and a last line that a crash left incomplete.

        Args:
            step: the step of the checkpoint the run continues from; its own rows stay.
            discarded: where the cut rows are appended, if anywhere.

        Returns:
            How many rows were cut.
        """
        if not self.path.exists():
            return 0
        keep = 0
        with open(self.path, "rb") as file:
            for line in file:
                row = _parse(line)
                if row is None or row.get("step", 0) > step:
                    break
                keep += len(line)
            file.seek(keep)
            tail = file.read()
        if tail:
            if discarded is not None:
                with open(discarded, "ab") as file:
                    file.write(tail)
            os.truncate(self.path, keep)
        return len(tail.splitlines())


class EventLog:
    """events.jsonl: what happened to a run (starts, resumes, faults), with the time; never cut, never compared."""

    def __init__(self, path: Path) -> None:
        self._log = MetricsLog(path)

    def write(self, event: str, **details: Any) -> None:
        """Appends one event."""
        self._log.write({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **details})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line still being written is left out.

    Raises:
        DataError: the file is missing, or a line inside it is not a JSON object.
    """
    try:
        return list(_rows(path))
    except OSError as error:
        raise DataError(
            f"no metrics to read ({error.strerror})", where=path, hint="Give the folder of a run"
        ) from error


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            row = _parse(line)
            if row is None and not line.endswith(b"\n"):
                return
            if row is None:
                raise DataError("not a JSON object", where=f"{path}:{number}", hint="There is one a line")
            missing = [key for key in ROW_KEYS.get(str(row.get("kind")), ("kind",)) if key not in row]
            if missing:
                raise DataError(f"not a row of a run: no {missing[0]}", where=f"{path}:{number}")
            yield row


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
