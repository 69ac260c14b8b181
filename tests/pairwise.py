"""Combinations of values that tests are run with: every pair of them at once, the others with `make test-slow`."""

from collections.abc import Collection, Mapping
from itertools import product
from typing import Any

import pytest


def pairwise(one_in: int, **axes: Collection[Any]) -> pytest.MarkDecorator:
    """Parametrizes by all combinations, of which one in `one_in` is quick.

    With three axes or more, of which all but one at a time have `one_in` values or more, each pair of values of two
    axes is in a quick combination: the places of its values add up to a multiple of `one_in`.

    Args:
        axes: name of the argument → its values, or their ids → values.
    """
    named = [list(axis.items()) if isinstance(axis, Mapping) else [(str(x), x) for x in axis] for axis in axes.values()]
    cases = []
    for places in product(*(range(len(axis)) for axis in named)):
        ids, values = zip(*(axis[place] for axis, place in zip(named, places, strict=True)), strict=True)
        marks = [pytest.mark.slow] if sum(places) % one_in else []
        cases.append(pytest.param(*values, id="-".join(ids), marks=marks))
    return pytest.mark.parametrize(tuple(axes), cases)
