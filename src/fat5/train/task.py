"""What a run trains on. The trainer knows a `Task` and nothing else about pretraining, fine-tuning or any other one."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from fat5.data import PackedBatch
from fat5.train.checkpoint.state import RunState
from fat5.train.config import RunConfig
from fat5.train.evaluation import Scorer
from fat5.train.run_directory import RunDirectory
from fat5.train.world import World


class Loader(Protocol):
    """Endless packed batches; their position is a small mapping, and any position is reached in O(1)."""

    @property
    def micro_batches_per_step(self) -> int:
        """Batches of this process that make one step."""

    def __iter__(self) -> Iterator[PackedBatch]:
        """From the position on."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches handed out; JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a position at the next `iter`; refuses that of other data."""


class Task(Protocol):
    """Data, measure and results of a run."""

    @property
    def verb(self) -> str:
        """The command's name, for the display."""

    @property
    def config(self) -> RunConfig:
        """Resolved: nothing in it says auto."""

    @property
    def loader(self) -> Loader:
        """The training batches."""

    @property
    def part(self) -> str:
        """What a score is divided by, a noun: a row of metrics.jsonl has the parts under `by_{part}`."""

    @property
    def reference(self) -> tuple[str, float] | None:
        """Label and loss of a line that the plot draws for comparison."""

    def announce(self, world: World) -> list[str]:
        """Lines about the run for the user, before its first step.

        Raises:
            ConfigurationError: the device's memory cannot hold the run.
        """

    def build_model(self) -> Any:
        """A model on the CPU, its weights drawn from torch's generator or read from a folder."""

    def objective(self, model: Any) -> Any:
        """What a step runs: a module that gives packed batches a loss; the model itself if it does."""

    def title(self, model: Any) -> str:
        """A line above the plot."""

    def identity(self) -> dict[str, Any]:
        """What must be equal when a checkpoint is continued: configuration and hashes of the data, as JSON."""

    def evaluate(self, scorer: Scorer) -> dict[str, Any]:
        """Scores the model on the validation data: loss, accuracy, tokens, `by_{part}`, and other metrics by name."""

    def rank(self, scores: dict[str, Any]) -> float:
        """The number of an evaluation that decides which checkpoint is best, or when to stop: lower is better."""

    def summary(self, state: RunState) -> dict[str, Any]:
        """What summary.json says besides what the trainer knows."""

    def finish(self, scorer: Scorer, run: RunDirectory, warn: Callable[[str], None]) -> dict[str, Any]:
        """Looks at the trained model once more and writes files of its own; the result goes into summary.json."""

    def export(self, model: Any, run: RunDirectory, summary: dict[str, Any]) -> None:
        """Writes the model's folder, with its tokenizer and card."""
