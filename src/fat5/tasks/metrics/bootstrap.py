"""Metrics over samples drawn with replacement, as counts: how often each example is in each sample.

With counts, a metric made of sums over examples is one product of matrices for all samples.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fat5.errors import ConfigurationError

Floats = NDArray[np.float64]

MOST_COUNTS = 1 << 22
"""Counts held at once, 8 bytes each."""

BOUNDS = (2.5, 97.5)


@dataclass(frozen=True)
class Metric:
    """A metric of a fixed set of examples."""

    examples: int
    resample: Callable[[Floats], Floats]
    """Counts (samples, examples) → the metric of each sample, nan where it is not defined"""
    of_set: Callable[[], float] | None = None
    """The value as a library computes it; if not given, that of the sample with each example once"""

    def value(self) -> float:
        """The metric of the set itself; nan if it is empty."""
        if self.examples == 0:
            return float("nan")
        if self.of_set is not None:
            return float(self.of_set())
        return float(self.resample(np.ones((1, self.examples)))[0])


def samples(examples: int, resamples: int, seed: int) -> Iterator[Floats]:
    """Counts of bootstrap samples, some rows at a time; the rows depend on the arguments alone."""
    if examples == 0:
        return
    generator = np.random.default_rng(seed)
    rows = max(1, MOST_COUNTS // examples)
    for start in range(0, resamples, rows):
        drawn = (generator.integers(examples, size=examples) for _ in range(min(rows, resamples - start)))
        yield np.array([np.bincount(one, minlength=examples) for one in drawn], dtype=np.float64)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% percentile interval of resampled values; nan if none is defined."""
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.percentile(defined, BOUNDS)
    return float(low), float(high)


def mean_of(scores: Sequence[float] | Floats) -> Metric:
    """The mean of a score of each example."""
    column = np.asarray(scores, dtype=np.float64)
    return Metric(len(column), lambda counts: counts @ column / counts.sum(1))


def ratio(above: Floats, below: Floats) -> Floats:
    """Quotients; 0 where the divisor is 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below != 0)


def eval_library(module: str, package: str) -> Any:
    """A module of the extra `eval`.

    Raises:
        ConfigurationError: its package is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"this metric needs the {package} package, which is not installed", hint="pip install 'fat5[eval]'"
        ) from error
