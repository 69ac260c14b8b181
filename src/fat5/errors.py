"""The errors that a user can correct, and checks that come before the work.

The command line prints each error as one line and exits with code 2.
"""

import os
from pathlib import Path


class FAT5Error(Exception):
    """Something that the user can correct, said in one line: what, where, what to do.

    Args:
        what: the fault, without a final full stop.
        where: the file, key or position it was found at.
        hint: what to do about it.
    """

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        line = f"{where}: {what}" if where is not None else what
        # A path may contain a line break, and the message must not.
        super().__init__(" ".join((f"{line}. {hint}" if hint else line).splitlines()))


class ConfigurationError(FAT5Error, ValueError):
    """A configuration key has an impossible value."""


class DataError(FAT5Error, ValueError):
    """A corpus, shard or manifest cannot be read, or is damaged."""


class TokenizerError(FAT5Error, ValueError):
    """A tokenizer lacks special tokens, or does not belong to this data."""


class CheckpointError(FAT5Error, ValueError):
    """A checkpoint is damaged, unsafe, or belongs to another configuration."""


class CheckpointVersionError(CheckpointError):
    """A sound checkpoint has a format version that this FAT5 does not read."""


class CheckpointFileError(CheckpointError, OSError):
    """A file of a checkpoint is missing or cannot be read, for which stock transformers raises OSError."""


class CheckpointShapeError(CheckpointError, RuntimeError):
    """A tensor has the wrong shape for the configuration, for which stock transformers raises RuntimeError."""


class RunDirectoryError(FAT5Error):
    """A run directory is in use, or is none."""


class UnsupportedModelError(FAT5Error, TypeError):
    """A model is of an unsupported kind."""


LARGEST_SIZE = 1 << 24
"""Of a size or share in a configuration: a larger one overflows int32, or is computed for hours."""


def check_whole(value: object, key: str, least: int = 1, most: int = LARGEST_SIZE) -> None:
    """Raises ConfigurationError unless the value of a key is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigurationError(f"must be a whole number from {least:,} to {most:,}, not {value!r}", where=key)


def check_writable(path: str | Path, *, folder: bool = False, key: str = "output") -> Path:
    """Returns `path` if a file (or folder) can be written there; creates nothing.

    Raises:
        ConfigurationError: no such parent, a file in place of a folder or the reverse, or no permission.
    """
    path = Path(path)
    above = path.absolute() if folder else path.absolute().parent
    while folder and not above.exists() and above != above.parent:
        above = above.parent
    why = None
    if path.exists() and path.is_dir() != folder:
        why = "is a file" if folder else "is a folder"
    elif not above.exists():
        why = "cannot be written (its folder does not exist)"
    elif not above.is_dir():
        why = f"cannot be written ({above} is not a folder)"
    elif not os.access(path if path.exists() else above, os.W_OK):
        why = "cannot be written (permission denied)"
    if why:
        raise ConfigurationError(why, where=path, hint=f"Choose another --{key}")
    return path
