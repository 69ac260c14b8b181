"""Training: `run(task, world)` carries out a task; the loop, its checkpoints and its log know no task."""

from typing import TYPE_CHECKING

from fat5.lazy import lazy

if TYPE_CHECKING:
    from fat5.train.checkpoint.files import verify_checkpoint as verify_checkpoint
    from fat5.train.checkpoint.store import CheckpointStore as CheckpointStore
    from fat5.train.config import RunConfig as RunConfig
    from fat5.train.evaluation import Scorer as Scorer
    from fat5.train.evaluation import evaluate as evaluate
    from fat5.train.evaluation import unigram_entropy as unigram_entropy
    from fat5.train.guards import NonFiniteError as NonFiniteError
    from fat5.train.log.metrics import read_rows as read_rows
    from fat5.train.log.plots import draw_comparison as draw_comparison
    from fat5.train.log.plots import draw_run as draw_run
    from fat5.train.run_directory import RunDirectory as RunDirectory
    from fat5.train.signals import RunStopped as RunStopped
    from fat5.train.task import Task as Task
    from fat5.train.world import World as World

__getattr__, __dir__ = lazy(__name__, __file__)
