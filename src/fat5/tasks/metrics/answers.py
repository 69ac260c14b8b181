"""Answers to questions: exact match and F1 of words, normalised as SQuAD does (Rajpurkar et al. 2016 and 2018)."""

import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from operator import eq

from fat5.errors import ConfigurationError
from fat5.tasks.metrics.bootstrap import Metric, mean_of

ARTICLES = {
    "en": re.compile(r"\b(a|an|the)\b"),
    "fr": re.compile(r"\b(?:(?:le|la|les|un|une|des|du|au|aux)\b|[ld]['’])"),
}
"""Language → its articles, in lower case; French ones may be elided, or joined with a preposition."""


def answer_metrics(
    predictions: Sequence[str], targets: Sequence[Sequence[str]], names: Sequence[str], articles: str | None = "en"
) -> dict[str, Metric]:
    """exact_match and f1, from 0 to 1: for each question that of the nearest acceptable answer.

    A question without answers is right if the prediction is empty once normalised (SQuAD 2.0).

    Raises:
        ConfigurationError: no articles are known for the language.
    """
    if articles is not None and articles not in ARTICLES:
        raise ConfigurationError(f"articles is {articles!r}", hint=f"Choose {', '.join(ARTICLES)} or null")
    scores: dict[str, Callable[[list[str], list[str]], float]] = {"exact_match": eq, "f1": _f1}
    pairs = [
        (normalise(said, articles).split(), [normalise(one, articles).split() for one in right])
        for said, right in zip(predictions, targets, strict=True)
    ]
    return {
        name: mean_of([max(scores[name](said, one) for one in [*filter(None, right)] or [[]]) for said, right in pairs])
        for name in names
    }


def normalise(answer: str, articles: str | None = "en") -> str:
    """An answer in lower case, without punctuation, articles, or white space that says nothing.

    Args:
        articles: en is SQuAD's own form, to the letter: ASCII punctuation goes before the articles do. fr, and None,
            which keeps all articles, take the punctuation of any script, and an elided article before its apostrophe.
    """
    answer = answer.lower()
    if articles == "en":
        answer = ARTICLES["en"].sub(" ", answer.translate(_punctuation(of_any_script=False)))
    else:
        if articles is not None:
            answer = ARTICLES[articles].sub(" ", answer)
        answer = answer.translate(_punctuation(of_any_script=True))
    return " ".join(answer.split())


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    same = sum((Counter(said) & Counter(right)).values())
    return 2 * same / (len(said) + len(right))


@cache
def _punctuation(of_any_script: bool) -> dict[int, None]:
    """What `str.translate` removes punctuation by: ASCII's, or that of any script too."""
    wide = map(chr, range(sys.maxunicode + 1)) if of_any_script else ""
    letters = [*string.punctuation, *(letter for letter in wide if unicodedata.category(letter)[0] == "P")]
    return dict.fromkeys(map(ord, letters))
