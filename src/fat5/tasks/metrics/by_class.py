"""Precision, recall and F1 of each class, or of each type of entity."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fat5.tasks.metrics.entities import entities

ClassScores = dict[str, dict[str, float]]
"""Class → precision, recall, f1 (0 to 1), and support: how many targets are of it."""


def measure_by_class(kind: str, predictions: Sequence[Any], targets: Sequence[Any]) -> ClassScores:
    """The scores of each class that is predicted or right at least once, by name.

    Args:
        kind: classification (labels) or entities (lists of tags).
        predictions: one an example, as `measure` takes them.
        targets: likewise.
    """
    find = _types if kind == "entities" else _label
    hits: Counter[str] = Counter()
    found: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for said, right in zip(predictions, targets, strict=True):
        given, true = find(said), find(right)
        hits.update(name for name, _ in given & true)
        found.update(name for name, _ in given)
        wanted.update(name for name, _ in true)
    return {
        name: {
            "precision": hits[name] / max(1, found[name]),
            "recall": hits[name] / max(1, wanted[name]),
            "f1": 2 * hits[name] / (found[name] + wanted[name]),
            "support": wanted[name],
        }
        for name in sorted(found | wanted)
    }


def _types(tags: Sequence[str]) -> set[tuple[str, Any]]:
    return {(name, (start, end)) for name, start, end in entities(tags)}


def _label(label: str) -> set[tuple[str, Any]]:
    return {(label, None)}
