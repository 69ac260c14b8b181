"""The run files that docs/results.md is written from: what french.py left, read again, and numbers with intervals."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from fat5.train.log.metrics import read_rows

CONFIDENCE = 0.95
Rows = list[dict[str, Any]]


@dataclass
class Run:
    """A folder of results: run.json, and what else is there."""

    folder: Path
    facts: dict[str, Any]
    train: Rows = field(default_factory=list)
    evals: Rows = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> "Run":
        rows = read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
        train, evals = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
        return cls(folder, json.loads((folder / "run.json").read_text(encoding="utf-8")), train, evals)

    @property
    def name(self) -> str:
        return self.folder.name

    def file(self, name: str, seed: bool = False) -> dict[str, Any]:
        """A JSON file of the folder, or of its first seed; empty where there is none."""
        path = (self.seeds()[0] if seed else self.folder) / name
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found

    def lines(self, name: str, seed: bool = False) -> list[dict[str, Any]]:
        """A JSON-lines file of the folder, or of its first seed; empty where there is none."""
        path = (self.seeds()[0] if seed else self.folder) / name
        return [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def seeds(self) -> list[Path]:
        """The folders of its seeds; its own where it has one seed."""
        return sorted(self.folder.glob("seed-*")) or [self.folder]

    def seconds(self, steps: Sequence[float]) -> np.ndarray:
        """Seconds of training at some steps, without start, compilation and evaluations."""
        made = [0, *(row["step"] for row in self.train)]
        return np.interp(
            np.array(steps, float), made, [0.0, *(row.get("trained", row["seconds"]) for row in self.train)]
        )

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and losses of the evaluations."""
        own = [row.get("seconds") for row in self.evals]
        at = self.seconds([row["step"] for row in self.evals])
        at = np.array([place if one is None else one for place, one in zip(at, own)], float)
        return at, np.array([row["loss"] for row in self.evals], float)

    def last_loss(self) -> float:
        return float(self.evals[-1]["loss"]) if self.evals else math.nan


def read_runs(folder: Path) -> dict[str, Run]:
    """Name → run, of every folder with a run.json."""
    return {path.parent.name: Run.read(path.parent) for path in sorted(folder.glob("*/run.json"))}


def time_to(run: Run, loss: float) -> float | None:
    """Seconds until the validation loss of a run first is at most `loss`, between two evaluations by a line; None if
    it never is."""
    at, losses = run.curve()
    below = np.flatnonzero(losses <= loss)
    if not below.size:
        return None
    index = int(below[0])
    if not index:
        return float(at[0])
    before, after = losses[index - 1], losses[index]
    share = (before - loss) / (before - after)
    return float(at[index - 1] + share * (at[index] - at[index - 1]))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its t-interval; nan for one value."""
    known = np.array(values, float)
    if known.size < 2:
        return float(known.mean()) if known.size else math.nan, math.nan
    half = stats.t.ppf((1 + CONFIDENCE) / 2, known.size - 1) * known.std(ddof=1) / math.sqrt(known.size)
    return float(known.mean()), float(half)


def differ(first: Sequence[float], second: Sequence[float]) -> bool | None:
    """Whether two samples have different means, by Welch's test at 5%; None where one has fewer than two values."""
    if min(len(first), len(second)) < 2:
        return None
    if not (np.ptp(first) or np.ptp(second)):
        return first[0] != second[0]
    return bool(stats.ttest_ind(first, second, equal_var=False).pvalue < 1 - CONFIDENCE)


def shown(values: Sequence[float], form: str = "{:.3f}", scale: float = 1.0) -> str:
    """Mean ± half interval of some values; a dash where there are none."""
    if not values:
        return "–"
    mean, half = interval([value * scale for value in values])
    return form.format(mean) + (f" ± {form.format(half)}" if math.isfinite(half) else " (one seed)")
