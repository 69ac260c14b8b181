"""JSON that refuses what a reader would lose without a word: an object that has the same key twice."""

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """Parses JSON; `NaN` and `Infinity`, which Python writes, are read.

    Raises:
        ValueError: not JSON, nested too deeply, the same key twice in an object, or half of a surrogate pair.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique)
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair") from error
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return found
