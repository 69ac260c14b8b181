"""`fat5 completion SHELL`: completion of verbs, keys and values by the Tab key."""

import re
import shlex
from argparse import SUPPRESS, Action
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_args

from fat5.cli.main import VERBS
from fat5.cli.parsing import LIST_KEYS, KeysListed, literals, parse
from fat5.cli.recipes import recipe_names
from fat5.errors import ConfigurationError

Shell = Literal["bash", "zsh", "fish"]
MIXTURES = ("fat5", "fat5-anywhere", "ul2", "t5", "prefix-lm")
PRESETS = ("fat5-demo", "fat5-small", "fat5-base", "fat5-large")
LONGEST_HELP = 70


class Key(NamedTuple):
    """A key of a verb."""

    name: str
    values: list[str]
    """Empty where any will do; files are offered then"""
    about: str


def completion(shell: Shell | None = None) -> None:
    """Print a script that completes `fat5`: verbs, keys, and the names of recipes, presets and choices.

    Args:
        shell: bash, zsh or fish.
    """
    if shell is None:
        raise ConfigurationError("is required", where="shell", hint="Give bash, zsh or fish")
    keys = {verb: keys_of(verb) for verb in VERBS}
    print({"bash": bash, "zsh": zsh, "fish": fish}[shell](keys))


def keys_of(verb: str) -> list[Key]:
    """The keys of a verb, those that one starts with first."""
    try:
        import_module(f"fat5.cli.{verb}").main([LIST_KEYS])
    except KeysListed as listed:
        actions = [one for one in listed.actions if one.help != SUPPRESS and one.dest != "print_config"]
        return [Key(one.dest, _values(one), _about(one)) for one in actions]
    raise AssertionError(f"{verb} does not parse its keys")


def _values(action: Action) -> list[str]:
    kind: Any = getattr(action, "_typehint", None)
    last = action.dest.rpartition(".")[2]
    named = {"config": recipe_names(), "preset": PRESETS, "mixture": MIXTURES}.get(last, ())
    truths = ["true", "false"] if kind is bool or bool in get_args(kind) else []
    return list(named) or [*truths, *literals(kind)]


def _about(action: Action) -> str:
    """The first clause of a key's help."""
    said = re.sub(r" \([^)]*\)", "", " ".join((action.help or "").replace("%", "").split()))
    text = re.split(r"[;.:] ", said)[0].rstrip(".")
    return text if len(text) <= LONGEST_HELP else text[:LONGEST_HELP].rpartition(" ")[0] + " …"


def _cases(keys: dict[str, list[Key]], indent: str) -> str:
    """Lines of a `case VERB:PREVIOUS`, for bash and zsh: the values of a key."""
    chosen = {"completion:completion": get_args(Shell), "bench:bench": ("kernels",)}
    chosen |= {f"{verb}:--{key.name}": tuple(key.values) for verb in keys for key in keys[verb] if key.values}
    same: dict[tuple[str, ...], list[str]] = {}
    for where, values in chosen.items():
        same.setdefault(values, []).append(where)
    return "\n".join(f"{indent}{'|'.join(where)}) found=({' '.join(values)}) ;;" for values, where in same.items())


def bash(keys: dict[str, list[Key]]) -> str:
    """The script for bash."""
    flags = "\n".join(f"    {verb}) found=({' '.join(f'--{key.name}' for key in keys[verb])}) ;;" for verb in keys)
    return f"""# fat5 for bash: eval "$(fat5 completion bash)"
_fat5() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} verb=${{COMP_WORDS[1]}} before=${{COMP_WORDS[COMP_CWORD-1]}} found=()
  if [[ $word == = ]]; then word=""
  elif [[ $before == = ]]; then before=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  if ((COMP_CWORD == 1)); then found=({" ".join(VERBS)})
  elif [[ $word == -* ]]; then case $verb in
{flags}
    esac
  else case $verb:$before in
{_cases(keys, "    ")}
    esac
  fi
  COMPREPLY=($(compgen -W "${{found[*]}}" -- "$word"))
}}
complete -o default -F _fat5 fat5"""


def zsh(keys: dict[str, list[Key]]) -> str:
    """The script for zsh."""

    def described(rows: list[tuple[str, str]]) -> str:
        return " ".join(shlex.quote(f"{name}:{about}") for name, about in rows)

    flags = "\n".join(
        f"    {verb}) found=({described([(f'--{key.name}', key.about) for key in keys[verb]])}) ;;" for verb in keys
    )
    return f"""#compdef fat5
# fat5 for zsh: eval "$(fat5 completion zsh)", or this file as _fat5 in a folder of $fpath
_fat5() {{
  local verb=${{words[2]}} before=${{words[CURRENT-1]}}
  local -a found
  if compset -P '--*='; then before=${{IPREFIX%=}}; fi
  if ((CURRENT == 2)); then found=({described(list(VERBS.items()))})
  elif [[ $PREFIX == -* ]]; then case $verb in
{flags}
    esac
  else case $verb:$before in
{_cases(keys, "    ")}
    esac
  fi
  _describe fat5 found || _files
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _fat5 "$@"; else compdef _fat5 fat5; fi"""


def fish(keys: dict[str, list[Key]]) -> str:
    """The script for fish."""
    lines = ["# fat5 for fish: fat5 completion fish | source", "complete -c fat5 -n __fish_use_subcommand -f"]
    for verb, what in VERBS.items():
        lines.append(f"complete -c fat5 -n __fish_use_subcommand -a {verb} -d {shlex.quote(what)}")
        inside = f"complete -c fat5 -n '__fish_seen_subcommand_from {verb}'"
        for key in keys[verb]:
            values = f"-x -a {shlex.quote(' '.join(key.values))}" if key.values else "-r"
            if key.name == "help":
                values = ""
            elif key.name == "config":
                values = values.replace("-x", "-r")
            lines.append(f"{inside} -l {key.name} {values} -d {shlex.quote(key.about)}".replace("  ", " "))
    lines.append(f"complete -c fat5 -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(get_args(Shell))}'")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs the verb."""
    completion(**parse(completion, argv, "completion", words="shell"))
    return 0
