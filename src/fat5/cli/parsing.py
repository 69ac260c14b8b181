"""From a function's signature to a verb's command line and YAML file, with jsonargparse."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from fat5.errors import ConfigurationError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(
    signature: Callable[..., Any], argv: Sequence[str], verb: str, positional: dict[str, str] | None = None
) -> dict[str, Any]:
    """Reads `argv` (and any `--config FILE.yaml`) against the parameters of a function or dataclass.

    Args:
        signature: a function or dataclass whose typed, documented parameters are the keys. Dataclass-typed
            parameters nest: `--optimizer.lr`.
        argv: the words after the verb.
        verb: for the usage line and messages.
        positional: parameter name → nargs (``"*"``, ``"+"``, ``"?"``) for those given without a flag.

    Returns:
        Keyword arguments for `signature`, dataclasses instantiated.

    Raises:
        ConfigurationError: an unknown key or a value of the wrong type or form.
    """
    positional = positional or {}
    parser = ArgumentParser(
        prog=f"fat5 {verb}", description=(signature.__doc__ or "").split("\n\n")[0], exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below; flags win over it")
    add = parser.add_class_arguments if isinstance(signature, type) else parser.add_function_arguments
    add(signature, skip=set(positional))
    for name, nargs in positional.items():
        parser.add_argument(name, nargs=nargs, help=f"{name.replace('_', ' ')}")
    try:
        namespace = parser.parse_args(list(argv))
        values = parser.instantiate_classes(namespace)
    except ArgumentError as error:
        raise ConfigurationError(_one_line(str(error)), hint=f"`fat5 {verb} --help` lists the keys") from error
    return {key: value for key, value in values.items() if key != "config"}


def _one_line(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return "; ".join(lines).rstrip(".")[:600]


def is_tty() -> bool:
    """True where progress bars and colours help rather than fill a log."""
    return os.isatty(2)
