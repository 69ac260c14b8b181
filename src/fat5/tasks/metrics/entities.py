"""Entities of tag sequences: precision, recall and F1 over whole entities, and the accuracy of single tags."""

import re
from collections.abc import Sequence

import numpy as np

from fat5.errors import DataError
from fat5.tasks.metrics.bootstrap import Metric, ratio

OUTSIDE = "O"
PREFIXED = re.compile(r"([BIES])|([BIESLU])-(.*)", re.DOTALL)
OTHER_NAMES = {"L": "E", "U": "S"}
"""Last and unit of BILOU are end and single of IOBES."""

Entity = tuple[str, int, int]
"""Type, first token, last token."""


def entity_metrics(
    predictions: Sequence[Sequence[str]], targets: Sequence[Sequence[str]], names: Sequence[str]
) -> dict[str, Metric]:
    """precision, recall, f1 (micro, exact span and type) and accuracy, from 0 to 1.

    The definition is conlleval's, and that of seqeval's default mode. A ratio whose divisor is 0 is 0. Tags without a
    prefix are entities too: neighbours of one tag are one entity, and O is outside.

    Raises:
        DataError: an example has another number of predicted tags than of target tags.
    """
    rows = []
    for index, (said, right) in enumerate(zip(predictions, targets, strict=True)):
        if len(said) != len(right):
            raise DataError(f"example {index} has {len(said)} predicted tags for {len(right)} target tags")
        found, wanted = set(entities(said)), set(entities(right))
        hits = sum(one == other for one, other in zip(said, right, strict=True))
        rows.append((len(found & wanted), len(found), len(wanted), hits, len(right)))
    statistics = np.array(rows, dtype=np.float64).reshape(-1, 5)

    def quotient(above: Sequence[float], below: Sequence[float]) -> Metric:
        sums = statistics @ np.array([above, below]).T
        return Metric(len(sums), lambda counts: ratio(*(counts @ sums).T))

    metrics = {
        "precision": quotient((1, 0, 0, 0, 0), (0, 1, 0, 0, 0)),
        "recall": quotient((1, 0, 0, 0, 0), (0, 0, 1, 0, 0)),
        "f1": quotient((2, 0, 0, 0, 0), (0, 1, 1, 0, 0)),
        "accuracy": quotient((0, 0, 0, 1, 0), (0, 0, 0, 0, 1)),
    }
    return {name: metrics[name] for name in names}


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sequence: BIO, IOBES, BILOU or plain tags, malformed sequences included.

    An I- after O, or after another type, begins an entity, as in conlleval.
    """
    found: list[Entity] = []
    start, last, kind = 0, OUTSIDE, ""
    for index, tag in enumerate([*tags, OUTSIDE]):
        place, type_ = _parse(tag)
        inside = last != OUTSIDE
        ended = inside and (place in (OUTSIDE, "B", "S") or last in ("E", "S") or type_ != kind)
        if ended:
            found.append((kind, start, index - 1))
        if place != OUTSIDE and (ended or not inside):
            start = index
        last, kind = place, type_
    return found


def _parse(tag: str) -> tuple[str, str]:
    """Place (B, I, E, S or O) and type of a tag; a plain tag is the inside of its own type."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefixed = PREFIXED.fullmatch(tag)
    if prefixed is None:
        return "I", tag
    place = prefixed[1] or prefixed[2]
    return OTHER_NAMES.get(place, place), prefixed[3] or "_"
