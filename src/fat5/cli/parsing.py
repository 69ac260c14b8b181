"""From a function's signature to a verb's command line and YAML file, with jsonargparse."""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from fat5.cli.main import VERBS
from fat5.cli.recipes import find_recipe, recipe_names
from fat5.cli.spelling import spell_out
from fat5.errors import ConfigurationError
from fat5.yaml_text import read_yaml, refuse_repeated_keys

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_CONFIG_HELP = (
    f"A recipe: one that ships with FAT5, by name ({', '.join(recipe_names())}), or a YAML file, by its path, with any "
    "of the keys below; flags win over it"
)


def parse(
    signature: Callable[..., Any],
    argv: Sequence[str],
    verb: str,
    positional: dict[str, str] | None = None,
    section: str | None = None,
    words: str | None = None,
    recipe: str | None = None,
) -> dict[str, Any]:
    """Reads `argv` (and any `--config NAME`) against the parameters of a function or dataclass.

    Args:
        signature: a function or dataclass whose typed, documented parameters are the keys. Dataclass-typed
            parameters nest: `--optimizer.lr`.
        argv: the words after the verb.
        verb: for the usage line and messages.
        section: the section of a recipe to read, where it is not that of the verb.
        positional: parameter name → nargs (``"*"``, ``"+"``, ``"?"``) for those given without a flag.
        words: name of a list that has a flag, so that a recipe may hold it, and that words without a flag are the
            content of as well.
        recipe: the recipe that is read where `argv` names none.

    Returns:
        Keyword arguments for `signature`, dataclasses instantiated.

    Raises:
        ConfigurationError: an unknown key or a value of the wrong type or form.
    """
    positional = positional or {}
    description = (signature.__doc__ or "").split("\n\n")[0]
    parser = ArgumentParser(
        prog=f"fat5 {verb}",
        description=f"{description} Words without a flag are its {words}." if words else description,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help=_CONFIG_HELP)
    add = parser.add_class_arguments if isinstance(signature, type) else parser.add_function_arguments
    add(signature, skip=set(positional))
    for name, nargs in positional.items():
        default: dict[str, Any] = {"default": []} if nargs == "*" else {}
        parser.add_argument(name, nargs=nargs, **default, help=_parameter_help(signature, name))
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    argv = _read_recipes(argv, section or verb, recipe)
    argv = spell_out(argv, actions, bool(positional or words), words)
    _check_values(argv)
    try:
        namespace = parser.parse_args(argv)
        _refuse_null(namespace, parser)
        values = parser.instantiate_classes(namespace)
    except ConfigurationError:
        raise
    except (ArgumentError, ValueError, TypeError, OSError, RecursionError) as error:
        message = _one_line(str(error))
        raise ConfigurationError(message, hint=_hint(message, parser, verb)) from error
    return {key: value for key, value in values.items() if key != "config"}


def _read_recipes(argv: Sequence[str], section: str, default: str | None) -> list[str]:
    """Checks each `--config NAME` before the parser meets it, and puts one section of it in its place.

    A recipe whose top-level keys are all verbs (`tokenizer:`, `prepare:`, `pretrain:`) serves each of them; a verb
    without a section of its own (`demo`) reads the whole.
    """
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if default is not None and "--config" not in words:
        words = ["--config", default, *words]
    for i, word in enumerate(words[:-1]):
        if word == "--config":
            recipe = read_yaml(find_recipe(words[i + 1]), words[i + 1])
            sectioned = all(key in VERBS and isinstance(value, dict) for key, value in recipe.items())
            if sectioned and section in recipe:
                recipe = recipe[section]
            words[i + 1] = json.dumps(recipe, default=str)
    return words


def _check_values(argv: Sequence[str]) -> None:
    """Judges lists and mappings written on the command line as those of a recipe."""
    for word in argv:
        flag, _, value = word.partition("=")
        if flag != "--config" and value.startswith(("{", "[")) and "{" in value:
            refuse_repeated_keys(value, flag)


def _refuse_null(namespace: Any, parser: ArgumentParser) -> None:
    """The parser takes null for every key that has a default, whatever the key's type."""
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        if kind is not None and type(None) not in get_args(kind) and namespace.get(action.dest, 0) is None:
            raise ConfigurationError("null is no value here", where=action.dest, hint="Give one, or leave the key out")


def _parameter_help(signature: Callable[..., Any], name: str) -> str:
    """What the docstring says of a parameter: under `Args:`, or below a dataclass's attribute."""
    text = inspect.getsource(signature)
    found = re.search(rf'^    {name}: .*\n\s+"""([^"]+)"""', text, re.MULTILINE) or re.search(
        rf"^\s+{name}: (.+)$", signature.__doc__ or "", re.MULTILINE
    )
    return " ".join(found.group(1).split()) if found else name


def _hint(message: str, parser: ArgumentParser, verb: str) -> str:
    lists = f"`fat5 {verb} --help` lists the keys"
    unknown = re.search(
        r"unrecognized arguments: --(?P<flag>[\w.]+)|[Oo]ption '(?P<key>[\w.]+)' is not accepted"
        r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<member>[\w.]+)'",
        message,
    )
    if not unknown:
        return lists
    found = unknown.groupdict()
    asked = found["flag"] or found["key"] or f"{found['group']}.{found['member']}"
    keys = [action.dest for action in parser._actions]
    near = get_close_matches(asked, keys, n=1)
    return f"Did you mean {near[0]}? {lists}" if near else lists


def _one_line(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return re.sub(r":;", ":", "; ".join(lines)).rstrip(".")[:600]
