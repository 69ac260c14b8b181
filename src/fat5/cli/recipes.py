"""Recipes by name: `--config demo`, `--config fr/base`. They are YAML files in `fat5/recipes/`, part of the package."""

from difflib import get_close_matches
from pathlib import Path

from fat5.errors import ConfigurationError

FOLDER = Path(__file__).parents[1] / "recipes"
LAUNCH = FOLDER / "launch"
"""Scripts to copy, for several nodes, Slurm and spot instances"""


def recipe_names() -> list[str]:
    """Names of the shipped recipes, as `--config` takes them."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def launch_files() -> list[str]:
    """Names of the files in `LAUNCH`."""
    return sorted(path.name for path in LAUNCH.iterdir())


def find_recipe(name: str) -> Path:
    """The file that `--config` names: the shipped recipe of exactly that name, else a file on the disk.

    For a file of your own with a recipe's name, give its suffix or path: `demo.yaml`, `./demo`.

    Raises:
        ConfigurationError: neither a recipe nor a file.
    """
    names = recipe_names()
    if not name:
        raise ConfigurationError("is empty", where="config", hint=_shipped(names))
    if name in names:
        return FOLDER / f"{name}.yaml"
    path = Path(name)
    if path.is_dir():
        own = path / "config.yaml"  # of a run
        hint = f"Give the file: --config {own}" if own.is_file() else _shipped(names)
        raise ConfigurationError("is a folder, not a recipe", where=name, hint=hint)
    if path.is_symlink() and not path.exists():
        raise ConfigurationError("is a link that leads to no file", where=name, hint="Mend the link, or give the file")
    if not path.exists():
        raise ConfigurationError("neither a recipe nor a file", where=name, hint=_near(path, names))
    return path


def _near(path: Path, names: list[str]) -> str:
    """A hint with the recipe or file that was probably meant: named by a path, or misspelled."""
    bare = path.with_suffix("").as_posix().removeprefix("./")
    called = [name for name in names if bare == name or bare.endswith(f"/{name}")]
    recipe = called[:1] or get_close_matches(bare, names, n=1) or [n for n in names if n.endswith(f"/{bare}")][:1]
    beside = get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], n=1)
    meant = [str(path.parent / file) for file in beside] or recipe
    return f"Did you mean {meant[0]}? {_shipped(names)}" if meant else _shipped(names)


def _shipped(names: list[str]) -> str:
    return f"Shipped recipes: {', '.join(names)}"
