"""JSON from files that may be damaged or hostile."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply (which `json` alone raises as RecursionError).
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
