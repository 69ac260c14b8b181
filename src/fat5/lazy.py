"""Imports a room's names on first use, so that `import fat5` and a verb's help stay light."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy(room: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        room: the package's `__name__`.
        homes: public name -> module that defines it, relative to the room; "" for a module of the room itself.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        home = homes[name]
        value = getattr(import_module(f"{room}.{home}"), name) if home else import_module(f"{room}.{name}")
        setattr(sys.modules[room], name, value)
        return value

    return get, lambda: sorted(homes)
