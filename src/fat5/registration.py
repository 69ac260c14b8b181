"""`import fat5` registers its models and attention with transformers, yet imports neither torch nor transformers.

Registering needs the classes, which need torch, and the `fat5` command must answer --help without it. So registration
waits until somebody imports transformers, by a finder that wraps the import.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def register_with_transformers() -> None:
    """Registers now if transformers is imported already, else right after its import."""
    if "transformers" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Registrar) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registrar())


def _register() -> None:
    for room in ("fat5.model", "fat5.stock"):
        import_module(room)


class _Registrar(MetaPathFinder):
    looking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "transformers" or self.looking:
            return None
        self.looking = True
        try:
            spec = find_spec(name)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
