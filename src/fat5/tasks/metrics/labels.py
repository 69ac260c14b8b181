"""Classes and numbers: accuracy, macro-F1, Matthews' correlation; Pearson, Spearman, mean squared error; each class.

Values are scikit-learn's and scipy's. Samples of the bootstrap use the same formulas, for all samples at once.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fat5.tasks.metrics.bootstrap import Floats, Metric, eval_library, mean_of, ratio
from fat5.tasks.metrics.entities import entities

Codes = NDArray[np.int64]

ClassScores = dict[str, dict[str, float]]
"""Class → precision, recall, f1 (0 to 1), and support: how many targets are of it."""

ALIKE = 1e-12
"""A sample whose variance is below this share of its mean square is constant but for rounding."""


def classification_metrics(
    predictions: Sequence[str], targets: Sequence[str], names: Sequence[str]
) -> dict[str, Metric]:
    """accuracy, macro_f1 and matthews, of scikit-learn.

    macro_f1 is over the classes that are predicted or right at least once. matthews is 0 where either side has one
    class alone.
    """
    learn = eval_library("sklearn.metrics", "scikit-learn")
    said, right = [str(label) for label in predictions], [str(label) for label in targets]
    classes, codes = np.unique(np.array([*said, *right], dtype=object), return_inverse=True)
    given, true = codes[: len(said)], codes[len(said) :]
    count, examples = len(classes), len(right)

    def sums(counts: Floats) -> tuple[Floats, Floats, Floats]:
        """Right, predicted and true examples of each class, (samples, classes)."""
        hits = _sum_by(counts[:, given == true], true[given == true], count)
        return hits, _sum_by(counts, given, count), _sum_by(counts, true, count)

    def macro_f1(counts: Floats) -> Floats:
        hits, predicted, wanted = sums(counts)
        seen = predicted + wanted
        return ratio(2 * hits, seen).sum(1) / (seen > 0).sum(1)

    def matthews(counts: Floats) -> Floats:  # Gorodkin 2004, as scikit-learn has it
        hits, predicted, wanted = sums(counts)
        total = counts.sum(1)
        spread = (total**2 - (predicted**2).sum(1)) * (total**2 - (wanted**2).sum(1))
        return ratio(hits.sum(1) * total - (predicted * wanted).sum(1), np.sqrt(spread))

    def matthews_of_set() -> float:  # scikit-learn warns of a single label, which is no fault of the user
        return learn.matthews_corrcoef(right, said) if count > 1 else 0.0

    metrics = {
        "accuracy": Metric(examples, mean_of(given == true).resample, lambda: learn.accuracy_score(right, said)),
        "macro_f1": Metric(examples, macro_f1, lambda: learn.f1_score(right, said, average="macro", zero_division=0.0)),
        "matthews": Metric(examples, matthews, matthews_of_set),
    }
    return {name: metrics[name] for name in names}


def regression_metrics(
    predictions: Sequence[float], targets: Sequence[float], names: Sequence[str]
) -> dict[str, Metric]:
    """pearson, spearman (scipy) and mean_squared_error (scikit-learn).

    A correlation with a constant is nan, and so is everything where a number is not finite.
    """
    stats, learn = eval_library("scipy.stats", "scipy"), eval_library("sklearn.metrics", "scikit-learn")
    said, right = np.asarray(predictions, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    examples = len(right)
    if not (np.isfinite(said).all() and np.isfinite(right).all()):
        return {name: Metric(examples, lambda counts: np.full(len(counts), math.nan)) for name in names}
    centred = [column - column.mean() if examples else column for column in (said, right)]
    levels = [np.unique(column, return_inverse=True)[1] for column in (said, right)]

    def correlation(function: Callable[..., Any]) -> Callable[[], float]:
        varied = examples > 1 and np.ptp(said) > 0 and np.ptp(right) > 0
        return lambda: function(said, right).statistic if varied else math.nan

    def spearman(counts: Floats) -> Floats:
        return _pearson(counts, *(_ranks(counts, level) for level in levels))

    metrics = {
        "pearson": Metric(examples, lambda counts: _pearson(counts, *centred), correlation(stats.pearsonr)),
        "spearman": Metric(examples, spearman, correlation(stats.spearmanr)),
        "mean_squared_error": Metric(
            examples, mean_of((said - right) ** 2).resample, lambda: learn.mean_squared_error(right, said)
        ),
    }
    return {name: metrics[name] for name in names}


def confusion(predictions: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> NDArray[np.int64]:
    """How often each class (row) was predicted as each other (column), int64 (classes, classes), in the order given."""
    place = {label: index for index, label in enumerate(labels)}
    matrix = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(matrix, ([place[label] for label in targets], [place[label] for label in predictions]), 1)
    return matrix


def measure_by_class(kind: str, predictions: Sequence[Any], targets: Sequence[Any]) -> ClassScores:
    """The scores of each class (kind classification) or type of entity (entities) that is predicted or right at least
    once, by name. Predictions and targets are as `measure` takes them.
    """
    hits: Counter[str] = Counter()
    found: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for pair in zip(predictions, targets, strict=True):
        given, true = (set(entities(one)) if kind == "entities" else {(one,)} for one in pair)
        hits.update(name for name, *_ in given & true)
        found.update(name for name, *_ in given)
        wanted.update(name for name, *_ in true)
    return {
        name: {
            "precision": hits[name] / max(1, found[name]),
            "recall": hits[name] / max(1, wanted[name]),
            "f1": 2 * hits[name] / (found[name] + wanted[name]),
            "support": wanted[name],
        }
        for name in sorted(found | wanted)
    }


def _sum_by(counts: Floats, codes: Codes, classes: int) -> Floats:
    """Sums of the columns of each class: (samples, examples) → (samples, classes)."""
    sums = np.zeros((len(counts), classes))
    if len(codes):
        order = np.argsort(codes, kind="stable")
        held, starts = np.unique(codes[order], return_index=True)
        sums[:, held] = np.add.reduceat(counts[:, order], starts, axis=1)
    return sums


def _ranks(counts: Floats, levels: Codes) -> Floats:
    """Mean ranks within each sample, (samples, examples), less their mean."""
    held = _sum_by(counts, levels, int(levels.max()) + 1)
    ranks = held.cumsum(1) - (held - 1) / 2
    return ranks[:, levels] - (counts.sum(1, keepdims=True) + 1) / 2


def _pearson(counts: Floats, x: Floats, y: Floats) -> Floats:
    """Pearson's correlation of each sample; x and y are (examples,) or (samples, examples)."""
    total = counts.sum(1)

    def mean(values: Floats) -> Floats:
        return (counts * values).sum(1) / total

    mean_x, mean_y, square_x, square_y = mean(x), mean(y), mean(x * x), mean(y * y)
    spread_x, spread_y = square_x - mean_x**2, square_y - mean_y**2
    varied = (spread_x > ALIKE * square_x) & (spread_y > ALIKE * square_y)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (mean(x * y) - mean_x * mean_y) / np.sqrt(spread_x * spread_y)
    return np.where(varied, np.clip(values, -1, 1), math.nan)
