"""The forms of tasks, and the examples of a split: read, and encoded."""

from collections.abc import Sequence
from dataclasses import dataclass

from fat5.tasks.finetune.answers import Answers
from fat5.tasks.finetune.classes import Classification, Regression
from fat5.tasks.finetune.config import TaskData
from fat5.tasks.finetune.examples import ExampleSet, Form
from fat5.tasks.finetune.table import Table, hold_out, read_table
from fat5.tasks.finetune.tags import Tagging
from fat5.tasks.finetune.text import Instructions, TextToText

FORMS: dict[str, type[Form]] = {
    "text-to-text": TextToText,
    "instructions": Instructions,
    "sequence-classification": Classification,
    "regression": Regression,
    "token-classification": Tagging,
    "question-answering": Answers,
}


@dataclass
class Split:
    """The examples of one split, as rows and encoded."""

    name: str
    table: Table
    examples: ExampleSet


def read_splits(data: TaskData, form: Form, names: Sequence[str]) -> dict[str, Table]:
    """The rows of some splits of a run; those of validation are held out of train if no file is given for them.

    Raises:
        DataError, ConfigurationError: as `read_table` and `hold_out`.
    """
    found: dict[str, Table] = {}
    held_out = not data.validation
    if "train" in names or (held_out and "validation" in names):
        found["train"] = read_table(data.train, "train", data.subset, data.max_examples)
        if held_out:
            keys = form.keys(found["train"])
            found["train"], found["validation"] = hold_out(found["train"], keys, data.validation_fraction)
    for name in names:
        if name not in found:
            found[name] = read_table(getattr(data, name), name, data.subset, data.max_examples)
    return {name: found[name] for name in names}
