"""The keys of an optimizer; imports no torch, so that a verb's --help answers at once."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from fat5.errors import ConfigurationError

OptimizerName = Literal["adamw_scale", "adamw", "adafactor", "muon", "lamb"]

LARGEST_SETTING = 1000
"""The largest learning rate, weight decay or eps that is accepted; none above it trains."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw_scale": {
        "lr": 2e-2,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.0,
        "kahan": None,
        "state_dtype": None,
        "eps_before_correction": False,
    },
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "adafactor": {"lr": 1e-2, "weight_decay": 0.0},
    "muon": {"lr": 2e-2, "hidden_lr": 1e-3, "momentum": 0.95, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0},
    "lamb": {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0},
}
"""What each optimizer takes, and the value it has where the configuration is silent."""


@dataclass
class OptimizerConfig:
    """The optimizer and its settings; a key that the named optimizer does not take is refused."""

    name: OptimizerName = "adamw_scale"
    """adamw_scale (AdamW scaled by the RMS of each matrix), adamw (torch, fused), adafactor (torch), muon (torch, for
    hidden matrices; AdamWScale for the rest), lamb (package pytorch-optimizer)"""
    lr: float | None = None
    """Peak learning rate; each optimizer has its own default (adamw_scale, where it is relative to the RMS: 0.02, in
    fine-tuning 0.002; adamw: 0.001, in fine-tuning 0.0001)"""
    betas: tuple[float, float] | None = None
    """Decay of the first and second moment; (0.9, 0.999) for adamw_scale"""
    eps: float | None = None
    """Added to the root of the second moment; 1e-6 for adamw_scale"""
    weight_decay: float | None = None
    """Decoupled weight decay; norms and relative biases are spared; 0 by default"""
    kahan: bool | None = None
    """adamw_scale: compensate the rounding of the weights; by default for bf16 and fp16 weights"""
    state_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """adamw_scale: dtype of the first moment; float32 by default"""
    eps_before_correction: bool | None = None
    """adamw_scale: add eps before the bias correction, as the first FAT5 and nanoT5 do; false by default"""
    hidden_lr: float | None = None
    """muon: learning rate of the hidden matrices, on AdamW's scale; 1e-3 by default"""
    momentum: float | None = None
    """muon: momentum of the hidden matrices; 0.95 by default"""
    offload: bool = False
    """On a GPU, keep the optimizer's state in the host's memory; a step brings it over and back piece by piece, with
    the same numbers. Not for lamb"""

    def resolved(self) -> "OptimizerConfig":
        """A copy with the defaults of the named optimizer filled in.

        Raises:
            ConfigurationError: a key is set that this optimizer does not take, or a value is out of range.
        """
        taken = DEFAULTS[self.name]
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "offload")}
        for key, value in given.items():
            if value is not None and key not in taken:
                raise ConfigurationError(
                    f"optimizer.{key} is set, and {self.name} does not take it",
                    hint=f"{self.name} takes {', '.join(taken)}",
                )
        for key in ("lr", "eps", "weight_decay", "hidden_lr"):
            if given[key] is not None and not 0 <= given[key] <= LARGEST_SETTING:
                hint = f"Give a number from 0 to {LARGEST_SETTING:,}"
                raise ConfigurationError(f"optimizer.{key} is {given[key]}", hint=hint)
        for beta in (*(self.betas or ()), *([] if self.momentum is None else [self.momentum])):
            if not 0 <= beta < 1:
                raise ConfigurationError(f"optimizer has a decay of {beta}", hint="Betas and momentum lie in [0, 1)")
        if self.offload and self.name == "lamb":
            raise ConfigurationError(
                "optimizer.offload is true, and lamb counts the steps of all weights at once",
                hint="Use another optimizer, or offload false",
            )
        return replace(self, **{key: taken.get(key) for key, value in given.items() if value is None})  # type: ignore[arg-type]
