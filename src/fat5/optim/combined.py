"""Several optimizers over disjoint parameters, stepped and saved as one."""

from typing import Any

import torch


class CombinedOptimizer(torch.optim.Optimizer):
    """Steps each of its optimizers; its groups and state are theirs.

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
