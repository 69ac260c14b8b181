"""YAML from files that may be damaged or hostile: recipes, and the config.yaml of a run."""

from pathlib import Path
from typing import Any

import yaml

from fat5.errors import ConfigurationError

# A recipe is a page of text; a larger "configuration" is some other file given by mistake, or an attack on the parser.
LARGEST_CONFIGURATION = 1 << 20
DEEPEST_CONFIGURATION = 32


def read_yaml(path: Path, name: object) -> dict[str, Any]:
    """The keys of a YAML file, called `name` in messages.

    Raises:
        ConfigurationError: not a YAML file of `key: value` lines, or one with an alias or a key that stands twice.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_CONFIGURATION + 1)
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigurationError("cannot be read as UTF-8 text", where=name, hint="Give a YAML recipe") from error
    if len(text) > LARGEST_CONFIGURATION:
        raise ConfigurationError("too large for a configuration (over 1 MiB)", where=name, hint="Give a YAML recipe")
    try:
        # A recipe needs no aliases, which expand without bound, and no depth, which PyYAML reads in quadratic time.
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigurationError("YAML aliases (*name) are not read", where=name, hint="Write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST_CONFIGURATION:
                raise ConfigurationError("YAML nested too deeply", where=name, hint="Give a YAML recipe")
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), name)
        document = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or "too deeply nested, or not YAML"
        raise ConfigurationError(f"not valid YAML ({problem})", where=where, hint="Mend that line") from error
    if not isinstance(document, dict):
        raise ConfigurationError("holds no keys", where=name, hint="A recipe is `key: value` lines")
    return document


def refuse_repeated_keys(text: str, name: object) -> None:
    """Raises ConfigurationError where a key stands twice in a text; says nothing of one that is not YAML."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return
    _check_keys(node, name)


def _check_keys(node: Any, name: object) -> None:
    """PyYAML keeps the last of two equal keys and loses the others without a word."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    where = f"{name}:{key.start_mark.line + 1}"
                    raise ConfigurationError(f"key {key.value!r} stands twice", where=where, hint="Keep one of them")
                seen.add(key.value)
            _check_keys(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, name)
