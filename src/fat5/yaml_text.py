"""YAML from files that may be damaged or hostile: recipes, and the config.yaml of a run."""

import json
from pathlib import Path
from typing import Any

import yaml

from fat5.errors import ConfigurationError

LARGEST_CONFIGURATION = 1 << 20
"""A recipe is a page of text; a larger file is another one given by mistake, or an attack on the parser."""


def read_yaml(path: Path, name: object) -> dict[str, Any]:
    """The keys of a YAML file, called `name` in messages.

    Raises:
        ConfigurationError: not a YAML file of `key: value` lines, or one with an alias or a repeated key.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_CONFIGURATION + 1)
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigurationError("cannot be read as UTF-8 text", where=name, hint="Give a YAML recipe") from error
    if len(text) > LARGEST_CONFIGURATION:
        raise ConfigurationError("too large for a configuration (over 1 MiB)", where=name, hint="Give a YAML recipe")
    document = parse_yaml(text, name)
    if not isinstance(document, dict):
        raise ConfigurationError("holds no keys", where=name, hint="A recipe is `key: value` lines")
    return document


def parse_yaml(text: str, name: object) -> Any:
    """The content of a YAML text, called `name` in messages.

    Raises:
        ConfigurationError: not YAML, nested too deeply, or with an alias or a repeated key.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _RepeatedKeyError as error:
        where = f"{name}:{error.problem_mark.line + 1}"
        raise ConfigurationError(str(error.problem), where=where, hint="Keep one of them") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else str(name)
        problem = getattr(error, "problem", None) or "nested too deeply, or not YAML at all"
        raise ConfigurationError(f"not valid YAML ({problem})", where=where, hint="Correct that line") from error


def as_yaml(value: Any) -> str:
    """A value in YAML: its JSON, but for its pairs of escapes for one character."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in text)


def refuse_repeated_keys(text: str, name: object) -> None:
    """Raises ConfigurationError if a key stands twice in a text; a text that is not YAML passes."""
    try:
        parse_yaml(text, name)
    except ConfigurationError as error:
        if isinstance(error.__cause__, _RepeatedKeyError):
            raise


class _RepeatedKeyError(yaml.MarkedYAMLError):
    """A key stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """Refuses aliases, which expand without bound, and repeated keys, of which PyYAML would silently keep the last."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _RepeatedKeyError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node
