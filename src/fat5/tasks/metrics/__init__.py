"""What a fine-tuned model is measured with: each metric of a library, or equal to one, with a bootstrap interval.

    measure     the values              measure_with_intervals   with the bounds of a 95% interval
    KINDS       kind → its metrics      check_metric             refuses a name that a kind does not have
    labels.measure_by_class, labels.confusion   for the drawings of fat5.tasks.results

bleu, chrf and rouge are on their usual scale of 0 to 100. All others are fractions of 0 to 1, but for matthews, pearson
and spearman (-1 to 1) and mean_squared_error (the square of the targets' unit).

text.py, labels.py, entities.py and answers.py say how each kind is measured; bootstrap.py draws the samples.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from fat5.errors import ConfigurationError, DataError

KINDS: dict[str, tuple[str, ...]] = {
    "text": ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match"),
    "classification": ("accuracy", "macro_f1", "matthews"),
    "regression": ("pearson", "spearman", "mean_squared_error"),
    "entities": ("precision", "recall", "f1", "accuracy"),
    "answers": ("exact_match", "f1"),
}
"""Kind of target → the names of its metrics."""

LOWER_IS_BETTER = frozenset({"mean_squared_error"})

Interval = dict[str, float]
"""value, low, high."""


def measure(
    kind: str,
    predictions: Sequence[Any],
    targets: Sequence[Any],
    names: Sequence[str] | None = None,
    *,
    articles: str | None = "en",
) -> dict[str, float]:
    """The metrics of a set of predictions.

    Args:
        kind: text, classification, regression, entities or answers.
        predictions: one an example: a string (text, classification, answers), a number (regression), or a list of tags,
            BIO or plain (entities).
        targets: likewise; for text a string, or a list of references; for answers a list of acceptable strings, empty
            where there is no answer.
        names: the metrics wanted; all of the kind if not given.
        articles: language of the articles that answers are compared without: en (SQuAD's own), fr, or None to keep all.

    Returns:
        Name → value, nan where it is not defined: no examples, or a correlation with a constant.

    Raises:
        ConfigurationError: an unknown kind, name or language, or a library that is not installed.
        DataError: predictions and targets do not go together.
    """
    return {name: metric.value() for name, metric in _metrics(kind, predictions, targets, names, articles).items()}


def measure_with_intervals(
    kind: str,
    predictions: Sequence[Any],
    targets: Sequence[Any],
    names: Sequence[str] | None = None,
    *,
    articles: str | None = "en",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """As `measure`, with a 95% percentile interval of a bootstrap over examples (Efron and Tibshirani 1993, ch. 13).

    All metrics see the same samples, which depend on the seed and the number of examples alone. A sample for which a
    metric is not defined is left out of its interval.

    Returns:
        Name → value, low, high.
    """
    from fat5.tasks.metrics.bootstrap import interval, samples

    metrics = _metrics(kind, predictions, targets, names, articles)
    drawn: dict[str, list[float]] = {name: [] for name in metrics}
    for counts in samples(len(targets), resamples, seed):
        for name, metric in metrics.items():
            drawn[name].extend(metric.resample(counts).tolist())
    return {
        name: dict(zip(("value", "low", "high"), (metric.value(), *interval(drawn[name])), strict=True))
        for name, metric in metrics.items()
    }


def check_metric(kind: str, name: str) -> None:
    """Raises ConfigurationError, with the nearest name, for a metric that a kind does not have."""
    if kind not in KINDS:
        raise ConfigurationError(f"there is no kind of metrics {kind!r}", hint=_nearest(kind, tuple(KINDS)))
    if name not in KINDS[kind]:
        raise ConfigurationError(f"there is no metric {name!r} of {kind}", hint=_nearest(name, KINDS[kind]))


def _metrics(
    kind: str, predictions: Sequence[Any], targets: Sequence[Any], names: Sequence[str] | None, articles: str | None
) -> dict[str, Any]:
    if kind not in KINDS:
        check_metric(kind, "")
    names = KINDS[kind] if names is None else names
    for name in names:
        check_metric(kind, name)
    if len(predictions) != len(targets):
        raise DataError(f"{len(predictions)} predictions for {len(targets)} targets")
    from fat5.tasks.metrics import answers, entities, labels, text

    if kind == "answers":
        return answers.answer_metrics(predictions, targets, names, articles)
    make: dict[str, Callable[..., dict[str, Any]]] = {
        "text": text.text_metrics,
        "classification": labels.classification_metrics,
        "regression": labels.regression_metrics,
        "entities": entities.entity_metrics,
    }
    return make[kind](predictions, targets, names)


def _nearest(name: str, names: tuple[str, ...]) -> str:
    known = {one.lower(): one for one in names}
    asked = name.lower().replace("-", "_")
    near = get_close_matches(asked, known, n=1) or [one for one in known if asked in one]
    choices = ", ".join(names)
    return f"Did you mean {known[near[0]]}? There are {choices}" if near else f"Choose among {choices}"
