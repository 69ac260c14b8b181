"""JSON from files that may be damaged or hostile."""

import json
from typing import Any, TypeGuard


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply (which `json` alone raises as RecursionError).
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value of a JSON file is a whole number that fits into 63 bits, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON file is a number that a float can hold; NaN and infinity are."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63
    )
