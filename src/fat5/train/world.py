"""The processes that train together: who this one is, and what they tell each other. Alone, nothing is exchanged."""

import json
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fat5.errors import ConfigurationError
from fat5.files import parse_json

T = TypeVar("T")


def training_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def refuse_many_processes() -> None:
    """Refuses a run for which a launcher (torchrun, accelerate) has started several processes.

    Raises:
        ConfigurationError: WORLD_SIZE is above 1.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdecimal() and int(size) > 1:
        raise ConfigurationError(
            f"WORLD_SIZE is {size}: training on many devices is not there yet",
            hint="Run it without torchrun; CUDA_VISIBLE_DEVICES=N chooses the GPU",
        )


@dataclass(frozen=True)
class World:
    """This process among those of a run. Every operation must be called by all of them, in the same order."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> "World":
        """The world of this process: itself.

        Raises:
            ConfigurationError: a launcher has started several processes.
        """
        refuse_many_processes()
        return cls(training_device())

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files and speaks to the user."""
        return self.rank == 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_any(self, flag: Tensor) -> Tensor:
        """True where the flag of any process is; a bool tensor, which stays on its device."""
        return flag if self.size == 1 else self.all_sum(flag.int()) > 0

    def agree(self, value: T | None) -> T | None:
        """The value of the lowest rank that has one; None if none has. For the host's decisions."""
        if self.size == 1:
            return value
        return next((one for one in self._exchange(value) if one is not None), None)

    def broadcast(self, value: T) -> T:
        """The main process's value."""
        return value if self.size == 1 else self._exchange(value)[0]

    def _exchange(self, value: Any) -> list[Any]:
        """The value of every process, by rank. It travels as JSON: nothing that arrives is unpickled."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([text.numel()], device=self.device))
        longest = int(max(lengths))
        texts = [torch.empty(longest, dtype=torch.uint8, device=self.device) for _ in range(self.size)]
        dist.all_gather(texts, nn.functional.pad(text, (0, longest - text.numel())))
        return [parse_json(bytes(text[:length].tolist())) for text, length in zip(texts, lengths, strict=True)]
