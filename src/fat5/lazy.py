"""Imports a room's names on first use, so that `import fat5` and a verb's help stay light."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy(room: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562), for the names that it imports under `if TYPE_CHECKING:`.

    `room` and `file` are its `__name__` and `__file__`.
    """
    homes = {
        imported.name: line.module
        for block in ast.parse(Path(file).read_bytes()).body
        if isinstance(block, ast.If)
        for line in block.body
        if isinstance(line, ast.ImportFrom) and line.module
        for imported in line.names
    }

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        home = homes[name]
        value = import_module(f"{room}.{name}") if home == room else getattr(import_module(home), name)
        setattr(sys.modules[room], name, value)
        return value

    return get, lambda: sorted(homes)
