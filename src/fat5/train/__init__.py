"""Training: configuration, the loop, checkpoints, guards, metrics, plots. `pretrain(PretrainConfig(...))` is the door.

Names are imported when first used, so that a command that only draws a plot does not load a model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "CheckpointStore": "checkpoint",
    "DataConfig": "config",
    "Evaluation": "evaluation",
    "ModelConfig": "config",
    "NonFiniteError": "guards",
    "PretrainConfig": "config",
    "RunDirectory": "run_directory",
    "RunStopped": "signals",
    "SourceConfig": "config",
    "draw_comparison": "plots",
    "draw_run": "plots",
    "evaluate": "evaluation",
    "pretrain": "pretraining",
    "read_rows": "metrics",
    "unigram_entropy": "evaluation",
    "verify_checkpoint": "checkpoint_files",
}

if TYPE_CHECKING:
    from fat5.train.checkpoint import CheckpointStore
    from fat5.train.checkpoint_files import verify_checkpoint
    from fat5.train.config import DataConfig, ModelConfig, PretrainConfig, SourceConfig
    from fat5.train.evaluation import Evaluation, evaluate, unigram_entropy
    from fat5.train.guards import NonFiniteError
    from fat5.train.metrics import read_rows
    from fat5.train.plots import draw_comparison, draw_run
    from fat5.train.pretraining import pretrain
    from fat5.train.run_directory import RunDirectory
    from fat5.train.signals import RunStopped

__all__ = [
    "CheckpointStore",
    "DataConfig",
    "Evaluation",
    "ModelConfig",
    "NonFiniteError",
    "PretrainConfig",
    "RunDirectory",
    "RunStopped",
    "SourceConfig",
    "draw_comparison",
    "draw_run",
    "evaluate",
    "pretrain",
    "read_rows",
    "unigram_entropy",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fat5.train' has no attribute {name!r}")
    value = getattr(import_module(f"fat5.train.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
