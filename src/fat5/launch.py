"""What a launcher of many processes, torchrun, says about this one in its environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fat5.errors import ConfigurationError

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MEETING = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together; alone unless a launcher says otherwise."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of this node"""
    local_size: int = 1

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Launch":
        """What the environment says.

        Raises:
            ConfigurationError: a part is missing, or the numbers do not go together.
        """
        given = {name: environment[name] for name in NUMBERS if environment.get(name)}
        if not given or given.get("WORLD_SIZE") == "1":
            return cls()
        told = ", ".join(f"{name} is {value}" for name, value in given.items())
        hint = "Start it with torchrun --nproc-per-node N -m fat5 pretrain …, or unset them"
        missing = [name for name in (*NUMBERS, *MEETING) if not environment.get(name)]
        if missing:
            raise ConfigurationError(f"{told}, and {', '.join(missing)} not set", hint=hint)
        if not all(value.isascii() and value.isdecimal() for value in given.values()):
            raise ConfigurationError(f"{told}: not whole numbers", hint=hint)
        launch = cls(*(int(given[name]) for name in NUMBERS))
        if not (launch.rank < launch.size and launch.local_rank < launch.local_size <= launch.size):
            raise ConfigurationError(f"{told}: no such process", hint=hint)
        return launch


def is_main() -> bool:
    """True unless a launcher says that this process is not the first; the first speaks to the user."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def refuse_many_processes(what: str) -> None:
    """Refuses work that one process does, where a launcher has started several.

    Raises:
        ConfigurationError: WORLD_SIZE is above 1.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdecimal() and int(size) > 1:
        raise ConfigurationError(
            f"WORLD_SIZE is {size}, and {what} runs in one process",
            hint="Run it without torchrun; of the verbs, pretrain and finetune run under it",
        )
