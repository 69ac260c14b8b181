"""Rewrites a typed command line for jsonargparse: bare flags, lists without brackets, words without a flag."""

from argparse import Action
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from fat5.errors import ConfigurationError
from fat5.yaml_text import as_yaml

TRUTHS = ("true", "false", "yes", "no", "null")


def spell_out(argv: Sequence[str], actions: Mapping[str, Action], words: str | None) -> list[str]:
    """`argv` with each value joined to its flag, and recipes first, so that flags always win over them.

    Args:
        words: the key that takes words without a flag; one after `--strict` is then not its value. None leaves words
            to the parser.

    Returns:
        `argv` with ``--strict`` as ``--strict=true``, ``--data a b`` as ``--data=["a", "b"]``, and the words without a
        flag as ``--WORDS=[…]``.

    Raises:
        ConfigurationError: the key is given both as words and by its flag.
    """
    rest = list(argv)
    recipes: list[str] = []
    spelled: list[str] = []
    loose: list[str] = []
    while rest:
        word = rest.pop(0)
        if word == "--":
            loose, rest = loose + (rest if words else [word, *rest]), []
        elif not _is_flag(word):
            loose.append(word)
        else:
            flag, equals, value = word.partition("=")
            given = [value] if equals else _values(flag, actions.get(flag), rest, words is not None)
            made = _tied(flag, given, actions.get(flag))
            (recipes if flag == "--config" else spelled).extend(made)
    if words and loose:
        flag = f"--{words}"
        if any(word.partition("=")[0] in (flag, f"{flag}+") for word in spelled):
            raise ConfigurationError(f"given both as words and with {flag}", where=words, hint="Give one of the two")
        if _item(_kinds(actions[flag])) is None:
            return [*recipes, *spelled, f"{flag}={loose[0]}", *loose[1:]]
        return [*recipes, *spelled, f"{flag}={as_yaml(loose)}"]
    return [*recipes, *spelled, *loose]


def _is_flag(word: str) -> bool:
    return word == "-h" or (word.startswith("--") and not any(map(str.isspace, word.partition("=")[0])))


def _values(flag: str, action: Action | None, rest: list[str], takes_words: bool) -> list[str]:
    """Takes a flag's values from `rest`."""
    if action is not None and (action.nargs == 0 or action.dest == "print_config"):
        return []
    kinds = _kinds(action)
    if bool in kinds:
        foreign = not rest or _is_flag(rest[0]) or (takes_words and rest[0].lower() not in (*TRUTHS, *_names(kinds)))
        return ["true"] if foreign else [rest.pop(0)]
    several = _item(kinds) is not None and not flag.endswith("+")
    taken: list[str] = []
    while rest and not _is_flag(rest[0]) and (not taken or (several and not _is_list(taken[0]))):
        taken.append(rest.pop(0))
    return taken


def _tied(flag: str, values: list[str], action: Action | None) -> list[str]:
    if not values:
        return [flag]
    if action is None:
        return [flag, *values]
    item = None if flag.endswith("+") else _item(_kinds(action))
    optional = item is None and NoneType in get_args(getattr(action, "_typehint", None))
    if optional and values[0].lstrip().startswith("#"):  # YAML reads a comment there, and the parser null
        raise ConfigurationError(f"{values[0]!r} begins with #, a comment", where=flag.lstrip("-"), hint="Give another")
    if item is None or (len(values) == 1 and (_is_list(values[0]) or values[0] == "null")):
        return [f"{flag}={values[0]}"]
    return [f"{flag}={as_yaml(values) if item is str else '[' + ', '.join(values) + ']'}"]


def _is_list(value: str) -> bool:
    return value.lstrip().startswith("[")


def _kinds(action: Action | None) -> list[Any]:
    """The types of a key, without None."""
    kind = getattr(action, "_typehint", None)
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [kind for kind in kinds if kind is not NoneType]


def _item(kinds: list[Any]) -> Any:
    """The type of a list's items, if the key takes only a list."""
    return get_args(kinds[0])[0] if len(kinds) == 1 and get_origin(kinds[0]) is list else None


def _names(kinds: list[Any]) -> list[str]:
    return [str(name) for kind in kinds for name in get_args(kind)]
