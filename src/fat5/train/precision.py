"""Precision of a run: where the weights live, what the arithmetic uses, and the loss scale of fp16."""

import contextlib

import torch

from fat5.errors import CheckpointError, ConfigurationError
from fat5.files import is_number
from fat5.train.config import PrecisionName

LEAST_LOSS_SCALE = 1.0
"""fp16: below this the gradients themselves are at fault, not their scale."""


def resolve_precision(name: PrecisionName, device: torch.device) -> PrecisionName:
    """`auto` becomes bf16 on a GPU that has it and on a CPU with AMX, fp16 on an older GPU, fp32 on another CPU."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "bf16" if has_amx() else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def has_amx() -> bool:
    """Whether the CPU has matrix units for bfloat16 (Intel's Xeons since 2023)."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)  # not in every PyTorch
    return asked is not None and bool(asked())


class Precision:
    """What a resolved precision means for a step."""

    def __init__(self, name: PrecisionName, device: torch.device) -> None:
        if name == "auto":
            raise ConfigurationError("precision is still auto", hint="Resolve it first")
        self.name = name
        self.device = device
        self.weight_dtype = torch.bfloat16 if name == "bf16-pure" else torch.float32
        self.scaler = torch.amp.GradScaler(device.type, enabled=True) if name == "fp16" else None

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Around the forward pass."""
        if self.name == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        if self.name == "fp16":
            return torch.autocast(self.device.type, torch.float16)
        return contextlib.nullcontext()

    def state_dict(self) -> dict[str, float | int]:
        """The loss scaler's state, if there is one: plain numbers."""
        return self.scaler.state_dict() if self.scaler else {}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Restores the loss scaler.

        Raises:
            CheckpointError: not the state of one.
        """
        if self.scaler and state:
            if state.keys() != self.scaler.state_dict().keys() or not all(map(is_number, state.values())):
                raise CheckpointError("loss_scale is not the state of a loss scaler")
            self.scaler.load_state_dict(state)
