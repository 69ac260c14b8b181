"""The guards of each step: loss and gradient must be finite, a loss far above the others is noticed, and the examples
are put on record; a step that does not fit the memory is told in one line.
"""

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fat5.errors import FAT5Error
from fat5.files import write_json
from fat5.train.checkpoint.state import RunState
from fat5.train.world import World

MOST_IN_A_ROW = 10
"""Steps in a row that may be skipped or rewound; more than that, and it is not the data."""

HOST_IS_FULL = "can't allocate memory"
"""From PyTorch's allocator on a CPU, which raises RuntimeError."""

SPIKE_STEPS = 50
"""Steps over which mean and variance of the loss are taken, and before which nothing is a spike."""


class NonFiniteError(FAT5Error):
    """Loss or gradient of a step was NaN or infinite; the update was not made."""


def dump_examples(
    folder: Path, step: int, pieces: Sequence[Sequence[int]], losses: Sequence[float], grad_norm: float, world: World
) -> Path:
    """Writes `nonfinite-step-N.json`, the loss and the piece ids of each micro-batch, of all processes in the order of
    their ranks; returns its path.
    """
    path = folder / f"nonfinite-step-{step}.json"
    rows = gather_examples(pieces, losses, world)
    if not world.is_main:
        return path
    write_json(path, {"step": step, "grad_norm": str(grad_norm), "micro_batches": rows})
    return path


def gather_examples(pieces: Sequence[Sequence[int]], losses: Sequence[float], world: World) -> list[dict[str, Any]]:
    """Loss and piece ids of each micro-batch of all processes, in the order of their ranks, as JSON."""
    own = [{"loss": str(loss), "pieces": ids} for loss, ids in zip(losses, pieces, strict=True)]
    return [
        row | ({"rank": rank} if world.size > 1 else {}) for rank, some in enumerate(world.gather(own)) for row in some
    ]


def sigmas_above(state: RunState, loss: float, sigma: float) -> float | None:
    """Standard deviations by which a loss lies above those before it, if more than `sigma`; None otherwise.

    Mean and variance are exponential ones over SPIKE_STEPS steps, part of the run's state. A spike enters them cut to
    `sigma`, so that one does not hide the next, and a lasting rise is a spike no longer.
    """
    excess, limit = loss - state.loss_mean, sigma * max(state.loss_variance, 0.0) ** 0.5
    spiked = state.losses >= SPIKE_STEPS and excess > limit > 0
    state.losses += 1
    share = 1 / min(state.losses, SPIKE_STEPS)
    moved = limit if spiked else excess
    state.loss_mean += share * moved
    state.loss_variance = (1 - share) * (state.loss_variance + share * moved * moved)
    return excess / limit * sigma if spiked else None


@contextmanager
def memory_told(device: torch.device, doing: Callable[[], str]) -> Iterator[None]:
    """Inside, memory that runs out, the device's or the host's, is told in one line: shapes, peak, what to change.

    Args:
        doing: what the run was doing, with its shapes.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        on_device = _has_cause(error, lambda cause: isinstance(cause, torch.OutOfMemoryError))
        on_host = _has_cause(error, lambda cause: isinstance(cause, MemoryError) or HOST_IS_FULL in str(cause))
        if not on_device and not on_host:
            raise
        if on_device:
            peak = torch.cuda.max_memory_allocated(device) / 2**30
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        raise FAT5Error(
            f"out of {'GPU ' if on_device else ''}memory in {doing()} (peak {peak:.1f} GiB)",
            hint="Lower data.packs_per_micro_batch or set gradient_checkpointing, and the run continues from its last "
            "checkpoint; fewer tokens a pack need a new run",
        ) from error


def _has_cause(error: BaseException | None, fits: Callable[[BaseException], bool]) -> bool:
    """Whether an error, or one before it, fits: a recording of CUDA launches that fails raises another one."""
    while error is not None and not fits(error):
        error = error.__context__
    return error is not None
