"""`import fat5` makes transformers know FAT5's models and its attention, and stays light where nobody uses them.

Registering needs the classes, and those need torch: it waits until transformers is imported, and happens right after.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

HOST, ROOMS = "transformers", ("fat5.model", "fat5.stock")


def register_with_transformers() -> None:
    """Now where transformers is there already, else when it comes."""
    if HOST in sys.modules:
        _register()
    elif not any(isinstance(finder, _Registrar) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registrar())


def _register() -> None:
    for room in ROOMS:
        import_module(room)


class _Registrar(MetaPathFinder):
    """Finds transformers as others do, and imports `ROOMS` once it has been executed."""

    looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != HOST or self.looking:
            return None
        self.looking = True
        try:
            spec = find_spec(name)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
