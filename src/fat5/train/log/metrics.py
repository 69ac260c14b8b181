"""metrics.jsonl, the record of truth: one JSON object a line, and what a resumed run does with its tail."""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fat5.errors import DataError
from fat5.files import fsync, is_count, is_number, parse_json, whole_file

TIMES = ("seconds", "tokens_per_second", "data_wait_fraction", "mfu")
"""Keys that measure the machine; all others are equal in two runs of one configuration."""

ROW_KEYS = {
    "train": ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"),
    "eval": ("step", "loss", "accuracy"),
}
"""Kind of row → keys that every such row has."""

MAY_BE_NULL = ("loss", "grad_norm", "accuracy")
"""Keys of numbers that may not be finite."""

PARTS = "by_"
"""How the key of an evaluation begins under which its parts have their scores: name → loss, accuracy, tokens."""

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends rows to a JSON-lines file.

    A full disk never stops the run: rows are lost, and `on_failure` gets a text, once until rows can be written again.
    """

    def __init__(self, path: Path, on_failure: Callable[[str], object] | None = None) -> None:
        self.path = path
        self._on_failure = on_failure
        self._failing = False

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row, whole or not at all."""
        line = (json.dumps(row, allow_nan=True, ensure_ascii=False) + "\n").encode()
        try:
            with open(self.path, "ab+") as file:
                start = file.seek(0, os.SEEK_END)
                try:
                    # A crash may have left the last line incomplete; it must not swallow this one.
                    file.seek(max(0, start - 1))
                    file.write(line if file.read(1) in (b"", b"\n") else b"\n" + line)
                    file.flush()
                except OSError:
                    file.truncate(start)
                    raise
        except OSError as error:
            self._tell(error)
        else:
            self._failing = False

    def flush_to_disk(self) -> None:
        """Makes the rows survive a power cut; called before a checkpoint that relies on them."""
        try:
            fsync(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._tell(error)

    def rewind(self, step: int, discarded: Path, evaluated_at: int | None = None) -> list[int]:
        """Moves the rows after `step`, evaluations after `evaluated_at`, and lines that are not rows to another file;
        all other rows stay.

        Returns:
            Numbers of the lines inside the file that are not rows; an incomplete last line is what a crash leaves.
        """
        if not self.path.exists():
            return []
        aside: list[bytes] = []
        bad: list[int] = []
        last = {"train": step, "eval": step if evaluated_at is None else min(step, evaluated_at)}
        with open(self.path, "rb") as file, whole_file(self.path) as kept:
            for number, line in enumerate(file, start=1):
                row, fault = _parse(line)
                bad += [number] if fault and line.endswith(b"\n") else []
                whole = line.rstrip(b"\n") + b"\n"
                if row is not None and row["step"] <= last[row["kind"]]:
                    kept.write(whole)
                else:
                    aside.append(whole)
            if aside:
                with open(discarded, "ab") as lines:
                    lines.write(b"".join(aside))
                fsync(discarded)
        return bad

    def _tell(self, error: OSError) -> None:
        if not self._failing and self._on_failure is not None:
            self._on_failure(f"{self.path.name} cannot be written ({error.strerror}); training goes on")
        self._failing = True


def scores_of(row: dict[str, Any]) -> dict[str, float]:
    """The scores of an evaluation that only its task has, such as macro_f1; those that are not defined are left out."""
    common = ("step", "loss", "accuracy", "tokens")
    return {name: value for name, value in row.items() if name not in common and is_number(value)}


class EventLog:
    """events.jsonl: what happened to a run (starts, resumes, faults), with the time; never cut, never compared.

    Args:
        path: None for a process that writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._log = None if path is None else MetricsLog(path)

    def write(self, event: str, **details: Any) -> None:
        """Appends one event."""
        if self._log is not None:
            self._log.write({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **details})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file. A last line still being written is left out; so are other lines that are not rows,
    with a warning.

    Raises:
        DataError: the file is missing, or has lines but no row.
    """
    rows: list[dict[str, Any]] = []
    bad: list[tuple[int, str]] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                row, fault = _parse(line)
                if row is not None:
                    rows.append(row)
                elif line.endswith(b"\n"):
                    bad.append((number, fault))
    except OSError as error:
        raise DataError(
            f"no metrics to read ({error.strerror})", where=path, hint="Give the folder of a run"
        ) from error
    if bad and not rows:
        raise DataError(bad[0][1], where=f"{path}:{bad[0][0]}")
    if bad:
        logger.warning("%s: %s", path, name_lines([number for number, _ in bad]))
    return rows


def parts(row: dict[str, Any]) -> tuple[str, dict[str, dict[str, Any]]]:
    """What the scores of an evaluation are divided by, and the score of each part: a noun, and {name: {loss, …}}."""
    return next(((key[len(PARTS) :], scores) for key, scores in row.items() if key.startswith(PARTS)), ("part", {}))


def name_lines(numbers: Sequence[int]) -> str:
    """Says in a few words which lines are not rows."""
    named = ", ".join(map(str, numbers[:3])) + ", …" * (len(numbers) > 3)
    return f"line {named} is not a row of a run" if len(numbers) == 1 else f"lines {named} are not rows of a run"


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """The row of a line, or None and the reason why it has none."""
    try:
        row = parse_json(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        return None, "not a JSON object"
    fault = _fault(row)
    return (None, f"not a row of a run: {fault}") if fault else (row, "")


def is_row(value: object) -> bool:
    """Whether a JSON value is a row with all the keys of its kind, each of its type."""
    return isinstance(value, dict) and _fault(value) is None


def _fault(row: dict[str, Any]) -> str | None:
    kind = row.get("kind")
    if kind not in ("train", "eval"):
        return "no kind" if kind is None else f"kind is {str(kind)[:40]!r}"
    keys = ROW_KEYS[kind]
    for key in (*keys, *(key for key in row if key.startswith(PARTS))):
        if key not in row:
            return f"no {key}"
        if not _fits(key, row[key]):
            return f"{key} is {str(row[key])[:40]!r}"
    return None


def _fits(key: str, value: Any) -> bool:
    if key.startswith(PARTS):
        scores = value.values() if isinstance(value, dict) else [None]
        return all(isinstance(score, dict) and _fits("loss", score.get("loss", "")) for score in scores)
    if value is None:
        return key in MAY_BE_NULL
    return is_count(value) if key == "step" else is_number(value)
