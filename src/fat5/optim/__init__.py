"""Optimizers and schedules: AdamWScale, a registry of well-kept others, and learning rates as functions of the step."""

from fat5.optim.adamw_scale import AdamWScale
from fat5.optim.registry import OptimizerConfig, build_optimizer, parameter_groups, skips_on_device
from fat5.optim.schedules import ScheduleConfig, learning_rate

__all__ = [
    "AdamWScale",
    "OptimizerConfig",
    "ScheduleConfig",
    "build_optimizer",
    "learning_rate",
    "parameter_groups",
    "skips_on_device",
]
