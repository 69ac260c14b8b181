"""Optimizers and schedules: AdamWScale, a registry of well-kept others, and learning rates as functions of the step."""

from typing import TYPE_CHECKING

from fat5.lazy import lazy

if TYPE_CHECKING:
    from fat5.optim.adamw_scale import AdamWScale as AdamWScale
    from fat5.optim.config import OptimizerConfig as OptimizerConfig
    from fat5.optim.offload import OffloadedOptimizer as OffloadedOptimizer
    from fat5.optim.registry import build_optimizer as build_optimizer
    from fat5.optim.registry import parameter_groups as parameter_groups
    from fat5.optim.registry import skips_on_device as skips_on_device
    from fat5.optim.schedules import ScheduleConfig as ScheduleConfig
    from fat5.optim.schedules import learning_rate as learning_rate

__getattr__, __dir__ = lazy(__name__, __file__)
