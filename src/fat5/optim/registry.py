"""Optimizers by name, with their parameter groups: AdamWScale is ours, the others come from well-kept libraries."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from fat5.errors import ConfigurationError
from fat5.optim.adamw_scale import AdamWScale
from fat5.optim.config import OptimizerConfig
from fat5.optim.offload import OffloadedOptimizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Named(Protocol):
    """Weights by name: a model, or the parts of one that a process holds."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and weight."""


def build_optimizer(config: OptimizerConfig, model: Named) -> torch.optim.Optimizer:
    """The optimizer of `config` over the trainable parameters of `model`.

    Every parameter group carries ``peak_lr``; a trainer sets ``lr = peak_lr · learning_rate(schedule, step, steps)``.

    Raises:
        ConfigurationError: a setting that the optimizer does not take, or the package it comes from is missing.
    """
    config = config.resolved()
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    build: Callable[[dict[str, Any], list[tuple[str, nn.Parameter]]], torch.optim.Optimizer] = {
        "adamw_scale": _adamw_scale,
        "adamw": _adamw,
        "adafactor": _adafactor,
        "muon": _muon,
        "lamb": _lamb,
    }[config.name]
    optimizer = build(vars(config), named)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return _offloaded(optimizer, named) if config.offload else optimizer


def _offloaded(optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]]) -> OffloadedOptimizer:
    for name, weight in named:
        if not weight.is_cuda or type(weight) is not nn.Parameter:
            where = f"on {weight.device}" if not weight.is_cuda else "divided among processes"
            raise ConfigurationError(
                f"optimizer.offload is true, and {name} is {where}",
                hint="It takes whole weights on a GPU: set optimizer.offload to false",
            )
    return OffloadedOptimizer(optimizer)


def parameter_groups(named: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay; norms and other vectors, and tables of the relative bias, which do not.

    AdamWScale moves a table by lr itself at least: it starts near 0, and has to reach the size of attention scores
    before positions count (decision 0134).
    """
    of = {"matrices": {"weight_decay": weight_decay}, "vectors": {"weight_decay": 0.0}}
    of["tables"] = {"weight_decay": 0.0, "min_scale": 1.0}
    params: dict[str, list[nn.Parameter]] = {kind: [] for kind in of}
    for name, weight in named:
        params["tables" if is_bias_table(name) else "matrices" if decays(name, weight) else "vectors"].append(weight)
    return [{"params": params[kind], **settings} for kind, settings in of.items() if params[kind]]


def is_bias_table(name: str) -> bool:
    """True for T5's relative bias by bucket and head."""
    return "relative_attention_bias" in name


def decays(name: str, weight: torch.Tensor) -> bool:
    """True for the weights that weight decay applies to."""
    return weight.ndim >= 2 and not is_bias_table(name)


def is_hidden_matrix(name: str, weight: torch.Tensor) -> bool:
    """True for the 2-D weights between hidden activations: neither embeddings, nor the head, nor biases."""
    outside = ("shared", "embed", "lm_head")
    return weight.ndim == 2 and not is_bias_table(name) and not any(part in name for part in outside)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """True if `optimizer.step()` honours `optimizer.found_inf`, a device flag that leaves everything untouched."""
    return bool(getattr(optimizer, "skips_on_device", False))


def _adamw_scale(settings: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> AdamWScale:
    return AdamWScale(
        parameter_groups(named, settings["weight_decay"]),
        lr=settings["lr"],
        betas=settings["betas"],
        eps=settings["eps"],
        kahan=settings["kahan"],
        state_dtype=DTYPES[settings["state_dtype"]] if settings["state_dtype"] else None,
        eps_before_correction=bool(settings["eps_before_correction"]),
    )


def _adamw(settings: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    groups = parameter_groups(named, settings["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"], fused=True)
    optimizer.skips_on_device = True  # type: ignore[attr-defined]  # the fused kernel reads found_inf
    return optimizer


def _adafactor(settings: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(parameter_groups(named, settings["weight_decay"]), lr=settings["lr"])


def _muon(settings: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    hidden = [weight for name, weight in named if is_hidden_matrix(name, weight)]
    rest = [(name, weight) for name, weight in named if not is_hidden_matrix(name, weight)]
    if not hidden:
        raise ConfigurationError("optimizer.name is muon, and the model has no hidden matrix", hint="Use adamw_scale")
    # match_rms_adamw puts Muon's learning rate on the scale of AdamW's (Liu et al. 2025, section 2.2).
    muon = torch.optim.Muon(
        hidden,
        lr=settings["hidden_lr"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
        adjust_lr_fn="match_rms_adamw",
    )
    if not rest:
        return muon
    return CombinedOptimizer(muon, _adamw_scale(settings, rest))


def _lamb(settings: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import Lamb
    except ImportError as error:
        raise ConfigurationError(
            "optimizer.name is lamb, which needs the package pytorch-optimizer",
            hint="Install it with: pip install 'fat5[optim]'",
        ) from error
    groups = parameter_groups(named, settings["weight_decay"])
    # The trainer clips the gradient; LAMB's own clipping would be a second, hidden one.
    return Lamb(groups, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"], max_grad_norm=0.0)


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters, stepped and saved as one; its groups and state are theirs.

    Args:
        optimizers: over disjoint parameters. Their parameter groups appear here in order, as the same dictionaries, so
            a learning rate set here is set there.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.defaults: dict[str, Any] = {}
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> Any:  # type: ignore[override]
        return _JoinedState(self.optimizers)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


class _JoinedState:
    """Parameter → state, looked up in the optimizer that owns the parameter."""

    def __init__(self, optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
        self._owner = {
            weight: optimizer
            for optimizer in optimizers
            for group in optimizer.param_groups
            for weight in group["params"]
        }

    def __getitem__(self, weight: torch.Tensor) -> Any:
        return self._owner[weight].state[weight]

    def __contains__(self, weight: object) -> bool:
        return weight in self._owner and weight in self._owner[weight].state  # type: ignore[index]
