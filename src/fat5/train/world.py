"""How many processes train together. Today: one."""

import os

from fat5.errors import ConfigurationError


def refuse_many_processes() -> None:
    """Says no where a launcher (torchrun, accelerate) has started several processes for one run.

    Raises:
        ConfigurationError: WORLD_SIZE is above 1.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdecimal() and int(size) > 1:
        raise ConfigurationError(
            f"WORLD_SIZE is {size}: training on many devices is not there yet",
            hint="Run it without torchrun; CUDA_VISIBLE_DEVICES=N chooses the GPU",
        )
