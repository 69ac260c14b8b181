"""What a form of task is: how rows become examples, what is learned of them, and what the metrics compare."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from fat5.data import Tokenizer
from fat5.tasks.finetune.config import FinetuneConfig
from fat5.tasks.finetune.examples import ExampleSet
from fat5.tasks.finetune.table import Table


class Form(ABC):
    """A form of task, for one configuration and tokenizer.

    Attributes:
        kind: of its metrics (`fat5.tasks.metrics.KINDS`), and of its loss.
        model: the model's class without its family, such as ForConditionalGeneration.
        label_names: the classes or tags in the order of the model's outputs; None where there are none.
    """

    kind: ClassVar[str]
    model: ClassVar[str]

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer, label_names: list[str] | None = None) -> None:
        self.config, self.tokenizer, self.label_names = config, tokenizer, label_names

    def learn(self, table: Table) -> None:  # noqa: B027  (most have nothing to learn)
        """Takes from the training rows what the other splits are read by: classes, tags."""

    def keys(self, table: Table) -> list[str]:
        """What decides which rows stay together when some are held out."""
        return self.inputs(table)

    @abstractmethod
    def inputs(self, table: Table) -> list[str]:
        """What the model reads of each row, for a person."""

    @abstractmethod
    def references(self, table: Table) -> list[Any]:
        """What is right for each row, as the metrics compare it."""

    @abstractmethod
    def encode(self, table: Table) -> ExampleSet:
        """The examples of the rows.

        Raises:
            DataError: a row that does not fit, with its place.
        """

    def weights(self, table: Table) -> list[float] | None:
        """The weight of each class in the loss; None if all are equal, or there are no classes."""
        return None
