"""A verb's command line and YAML recipe, from the signature of a function or dataclass, with jsonargparse."""

import re
from argparse import SUPPRESS, Action
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from fat5.cli.main import VERBS
from fat5.cli.recipes import find_recipe, recipe_names
from fat5.cli.spelling import spell_out
from fat5.errors import ConfigurationError
from fat5.yaml_text import as_yaml, read_yaml, refuse_repeated_keys

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_CONFIG_HELP = (
    f"A recipe: one that ships with FAT5, by name ({', '.join(recipe_names())}), or a YAML file, by its path, with any "
    "of the keys below; flags win over it"
)


# The keys that one starts with; a verb's help shows them above the others.
FIRST_KEYS = {
    "demo": (
        "output_dir", "language", "prompts", "tokenizer.vocab_size", "prepare.inputs", "pretrain.steps",
        "pretrain.model.preset", "pretrain.optimizer.lr", "pretrain.seed",
    ),
    "init": ("language", "size", "device", "inputs", "output"),
    "completion": ("shell",),
    "tokenizer": ("inputs", "output_dir", "vocab_size", "model", "rows"),
    "prepare": ("inputs", "tokenizer", "output_dir", "workers", "validation_fraction", "steps", "verify"),
    "pretrain": (
        "output_dir", "data.sources", "model.preset", "model.position_encoding", "init_from", "steps", "optimizer.lr",
        "data.encoder_tokens", "data.decoder_tokens", "data.packs_per_step",
    ),
    "finetune": (
        "output_dir", "model", "task", "data.train", "data.test", "data.columns.source", "data.columns.target",
        "data.prefix", "epochs", "optimizer.lr", "lora.rank",
    ),
    "evaluate": ("model", "task", "data", "split", "predictions", "output", "mixture", "eval_tokens"),
    "generate": (
        "model", "prompts", "input", "output", "mode", "max_new_tokens", "num_beams", "sample", "temperature",
    ),
    "convert": ("model", "output_dir", "to", "dtype", "tokenizer"),
    "plot": ("runs", "x", "output"),
    "audit": ("inputs", "output_dir", "mixture", "examples"),
    "doctor": ("data.sources", "model.preset", "steps", "devices", "gpu", "budget", "measured", "json_output"),
}  # fmt: skip


LIST_KEYS = "\0"
"""In place of all words: asks for the keys themselves. No command line holds it."""


class KeysListed(Exception):  # noqa: N818  (an answer)
    """Says what keys a verb has."""

    def __init__(self, actions: list[Action]) -> None:
        super().__init__()
        self.actions = actions


def parse(
    signature: Callable[..., Any],
    argv: Sequence[str],
    verb: str,
    section: str | None = None,
    words: str | None = None,
    recipe: str | None = None,
) -> dict[str, Any]:
    """Reads `argv` (and any `--config NAME`) against the parameters of a function or dataclass.

    Args:
        signature: a function or dataclass whose typed, documented parameters are the keys. Dataclass-typed
            parameters nest: `--optimizer.lr`.
        section: the section of a recipe to read, if not the verb's own.
        words: name of the key that may also be given as words without a flag.
        recipe: the recipe that is read if `argv` names none.

    Returns:
        Keyword arguments for `signature`, dataclasses instantiated.

    Raises:
        ConfigurationError: an unknown key or a value of the wrong type or form.
        KeysListed: `argv` is LIST_KEYS.
    """
    description = (signature.__doc__ or "").split("\n\n")[0]
    parser = ArgumentParser(
        prog=f"fat5 {verb}",
        usage=f"fat5 {verb} [--config RECIPE] [--key value …]" + f" [{words} …]" * bool(words),
        description=f"{description} Words without a flag: its {words}." if words else description,
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help=_CONFIG_HELP)
    add = parser.add_class_arguments if isinstance(signature, type) else parser.add_function_arguments
    add(signature)
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    _put_first(parser, FIRST_KEYS.get(verb, ()), description)
    if argv == [LIST_KEYS]:
        raise KeysListed(parser._actions)
    argv = _read_recipes(argv, section or verb, recipe)
    argv = spell_out(argv, actions, words)
    _check_values(argv)
    try:
        namespace = parser.parse_args(argv)
        _refuse_null(namespace, parser)
        values = parser.instantiate_classes(namespace)
    except ConfigurationError:
        raise
    except (ArgumentError, ValueError, TypeError, OSError, RecursionError) as error:
        raise _in_our_words(str(error), parser, verb) from error
    return {key: value for key, value in values.items() if key != "config"}


def _read_recipes(argv: Sequence[str], section: str, default: str | None) -> list[str]:
    """Replaces each `--config NAME` by the content of that recipe, or of the verb's section of it.

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
            words[i + 1] = as_yaml(recipe)
    return words


def _check_values(argv: Sequence[str]) -> None:
    """Refuses repeated keys in mappings written on the command line, as in a recipe."""
    for word in argv:
        flag, _, value = word.partition("=")
        if flag.startswith("--") and flag != "--config" and value.startswith(("{", "[")) and "{" in value:
            refuse_repeated_keys(value, flag)


def _refuse_null(namespace: Any, parser: ArgumentParser) -> None:
    """The parser takes null for every key that has a default, whatever the key's type."""
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        if kind is not None and type(None) not in get_args(kind) and namespace.get(action.dest, 0) is None:
            raise ConfigurationError("null is no value here", where=action.dest, hint="Give one, or leave the key out")


class _Help(DefaultHelpFormatter):
    """Types in words, and only defaults that say something."""

    def _get_type_str(self, action: Action) -> str | None:
        kind = getattr(action, "_typehint", None)
        if kind is None or kind is bool or get_origin(kind) is Literal:  # the choices stand beside the flag
            return None
        return _in_words(kind, unset=action.default is None)

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action).replace("(type: ", "(")
        if action.default in ("", None, []):
            text = text.replace(" (default: %(default)s)", "").replace(", default: %(default)s)", ")")
        return text


def _put_first(parser: ArgumentParser, first: Sequence[str], description: str) -> None:
    """Shows `--config` and these keys in a group of their own, above all others."""
    names = ["config", *first]
    for action in parser._actions:
        if action.help == "Path to a configuration file.":  # of a section alone, which --config does as well
            action.help = SUPPRESS
    chosen = sorted((one for one in parser._actions if one.dest in names), key=lambda one: names.index(one.dest))
    start: Any = parser.add_argument_group("start with these")
    groups: list[Any] = [group for group in parser._action_groups if group is not start]
    for group in groups:
        group._group_actions = [action for action in group._group_actions if action not in chosen]
        if description.startswith(str(group.title)):
            group.title = "all other keys"
    start._group_actions = chosen
    parser._action_groups[:] = [start, *sorted(groups, key=lambda group: group.title == "options")]  # type: ignore[index]


def _in_our_words(message: str, parser: ArgumentParser, verb: str) -> ConfigurationError:
    """An error of jsonargparse in our words: the key, the expected and the given value, and the nearest name."""
    hint = f"`fat5 {verb} --help` lists the keys"
    keys = {action.dest: action for action in parser._actions}
    unknown = re.search(
        r"unrecognized arguments: (?P<dashes>--)(?P<flag>[\w.]+)|Group '(?P<group>[\w.]+)' does not accept option"
        r" '(?P<member>[\w.]+)'|\A\W*Option '(?P<key>[\w.]+)' is not accepted",
        message,
    )
    if unknown:
        found = unknown.groupdict()
        asked = found["flag"] or found["key"] or f"{found['group']}.{found['member']}"
        dashes = found["dashes"] or ""
        near = _nearest(asked, keys)
        return ConfigurationError(
            f"no key {dashes}{asked}", hint=f"Did you mean {dashes}{near}? {hint}" if near else hint
        )
    if needs := re.search(r"argument (?:--)?([\w.]+): expected (?:one|at least one) argument", message):
        return ConfigurationError("expected a value, got none", where=needs[1], hint=hint)
    if needs := re.search(r"Key \"([\w.]+)\" is required|\A\W*the following arguments are required: ([\w.]+)", message):
        return ConfigurationError("is required", where=needs[1] or needs[2], hint=hint)
    wrong = re.search(r"Parser key \"([\w.]+)\"", message)
    if wrong is None or wrong[1] not in keys:
        return ConfigurationError(_one_line(message), hint=hint)
    inner = re.search(r"class_path '[\w.]+': *\n? *-? *(.*)", message)
    if inner:  # an item of a list
        said = re.sub(r"Option ('[\w.]+') is not accepted", r"no key \1 in an item", inner[1])
        said = re.sub(r"the following arguments are required: ", "an item lacks ", said)
        return ConfigurationError(_one_line(said), where=wrong[1], hint=hint)
    kind = getattr(keys[wrong[1]], "_typehint", None)
    given = re.search(r"(?:Got value|Given value): (.*)|Unable to load config ['\"](.*)['\"]", message)
    value = (given[1] or given[2] or "").strip().rstrip(".") if given else "something else"
    close = get_close_matches(value, literals(kind), n=1)
    meant = f"Did you mean {close[0]}? " if close else ""
    if value.startswith("{") and re.search(r"\w:[^\s/]", value):  # YAML reads `a:1` as a name
        meant = "Write a space after each colon. "
    expected = _in_words(kind, unset=keys[wrong[1]].default is None)
    return ConfigurationError(f"expected {expected}, got {value[:200]!r}", where=wrong[1], hint=meant + hint)


def _nearest(asked: str, keys: Iterable[str]) -> str | None:
    """The key that was probably meant: one with this last part, one with these letters, or the most similar."""
    names = [key for key in keys if key not in ("help", "print_config")]
    leaf = asked.rpartition(".")[2]
    similar = get_close_matches(asked, names, n=3)
    candidates = [key for key in names if key.rpartition(".")[2] == leaf]
    candidates += [key for key in similar if sorted(key) == sorted(asked)]
    return next(iter([*candidates, *similar]), None)


def literals(kind: Any) -> list[str]:
    """The words that a type allows."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    return [value for part in get_args(kind) for value in literals(part)]


def _in_words(kind: Any, unset: bool = False) -> str:
    """A type as a person says it; without null if that is what the key is where nobody sets it."""
    words = [word for word in _alternatives(kind) if not (unset and word == "null")]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _alternatives(kind: Any) -> list[str]:
    plain = {int: "a whole number", float: "a number", str: "text", NoneType: "null"}
    parts = get_args(kind)
    if kind is bool:
        return ["true", "false"]
    if kind in plain:
        return [plain[kind]]
    if get_origin(kind) is Literal:
        return [str(value) for value in parts]
    if get_origin(kind) in (Union, UnionType):
        return [word for part in parts for word in _alternatives(part)]
    if get_origin(kind) in (list, tuple):
        several = {int: "whole numbers", float: "numbers", str: "texts"}
        named = _in_words(parts[0]) if literals(parts[0]) else several.get(parts[0], "keys with values")
        return [f"a list of {len(parts)} {named}" if get_origin(kind) is tuple else f"a list of {named}"]
    return ["keys with values"]


def _one_line(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return re.sub(r":;", ":", "; ".join(lines)).rstrip(".")[:600]
