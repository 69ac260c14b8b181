"""The errors a user can mend. The command line prints each as one line and exits with code 2."""


class FAT5Error(Exception):
    """Something the user can mend, said in one line: what, where, what to do.

    Args:
        what: the fault, without a final full stop.
        where: the file, key or position it was found at.
        hint: the next step that mends it.
    """

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        line = f"{where}: {what}" if where is not None else what
        super().__init__(f"{line}. {hint}" if hint else line)


class ConfigurationError(FAT5Error, ValueError):
    """A configuration key has a value that cannot work."""


class DataError(FAT5Error, ValueError):
    """A corpus, shard or manifest cannot be read as what it should be."""


class TokenizerError(FAT5Error, ValueError):
    """A tokenizer lacks what is needed, or does not belong to this data."""


class CheckpointError(FAT5Error, ValueError):
    """A checkpoint is damaged, unsafe, or of another configuration."""


class RunDirectoryError(FAT5Error):
    """A run directory is in use, or holds something else."""


class UnsupportedModelError(FAT5Error, TypeError):
    """A model is of a kind that cannot be served."""
