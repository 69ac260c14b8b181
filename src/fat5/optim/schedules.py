"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no schedule state."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from fat5.errors import ConfigurationError

ScheduleName = Literal["cosine", "linear", "inverse_sqrt", "constant", "wsd"]


LONGEST_WARMUP = 10_000
"""Warm-up steps of T5's own pretraining (Raffel et al. 2020, section 3.1.2)."""


@dataclass
class ScheduleConfig:
    """How the learning rate goes over a run: a linear warm-up, then the named shape."""

    name: ScheduleName = "cosine"
    """cosine or linear (down to final_factor at the last step), inverse_sqrt (of the step), constant, or wsd
    (warm-up, stable, then a linear decay over the last decay_steps)"""
    warmup_steps: int | None = None
    """Steps over which the rate rises linearly to its peak; a fifteenth of the run, at most 10,000, if not given"""
    final_factor: float = 0.0
    """Share of the peak at the last step (cosine, linear, wsd), and the least share (inverse_sqrt)"""
    decay_steps: int | None = None
    """Length of wsd's decay; a tenth of the run if not given"""

    def validate(self, total_steps: int) -> None:
        """Raises ConfigurationError where these settings cannot make a schedule of `total_steps`."""
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= total_steps:
            raise ConfigurationError(
                f"schedule.warmup_steps is {self.warmup_steps}, and the run has {total_steps} steps",
                hint="Choose a warm-up between 0 and the number of steps",
            )
        if not 0.0 <= self.final_factor <= 1.0:
            raise ConfigurationError(
                f"schedule.final_factor is {self.final_factor}", hint="It is a share of the peak: between 0 and 1"
            )
        if self.decay_steps is not None and (self.name != "wsd" or not 0 < self.decay_steps <= total_steps):
            raise ConfigurationError(
                f"schedule.decay_steps is {self.decay_steps} with schedule {self.name} of {total_steps} steps",
                hint="It belongs to wsd, between 1 and the number of steps",
            )

    def resolved(self, total_steps: int) -> "ScheduleConfig":
        """A copy whose warm-up is a number."""
        return replace(self, warmup_steps=self.warmup(total_steps))

    def warmup(self, total_steps: int) -> int:
        """Steps of the warm-up of a run of `total_steps`."""
        return min(total_steps // 15, LONGEST_WARMUP) if self.warmup_steps is None else self.warmup_steps


def learning_rate(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Share of the peak learning rate for update number `step` (counted from 0) of `total_steps`.

    The first update of a warm-up of w steps takes 1/w, update w − 1 takes 1. The last update of cosine, linear and wsd
    takes exactly `final_factor`. Steps beyond the end keep the last value.
    """
    start = config.warmup(total_steps)
    if step < start:
        return (step + 1) / start
    if config.name == "constant":
        return 1.0
    if config.name == "inverse_sqrt":
        return max(config.final_factor, math.sqrt(max(start, 1) / (step + 1)))
    if config.name == "wsd":
        decay = config.decay_steps if config.decay_steps is not None else max(1, total_steps // 10)
        start = max(start, total_steps - decay)
    # Counted from the last update at the peak, so that the last of the run lands on the end of the shape.
    progress = min(1.0, max(0.0, (step - start + 1) / max(1, total_steps - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.name == "cosine" else 1 - progress
    return config.final_factor + (1 - config.final_factor) * shape
