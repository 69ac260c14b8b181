"""What is trained: each task gives the trainer its data, its measure and its results. And the demo."""

from typing import TYPE_CHECKING

from fat5.lazy import lazy

if TYPE_CHECKING:
    from fat5.tasks.config import DataConfig as DataConfig
    from fat5.tasks.config import EvaluateConfig as EvaluateConfig
    from fat5.tasks.config import ModelConfig as ModelConfig
    from fat5.tasks.config import PretrainConfig as PretrainConfig
    from fat5.tasks.config import SourceConfig as SourceConfig
    from fat5.tasks.pretraining import Pretraining as Pretraining
    from fat5.tasks.pretraining import pretrain as pretrain
    from fat5.tasks.scoring import evaluate_model as evaluate_model

__getattr__, __dir__ = lazy(__name__, __file__)
