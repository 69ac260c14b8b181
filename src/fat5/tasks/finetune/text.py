"""Text in, text out: translation, summarisation, correction, and instructions with worked examples."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from fat5.data import Tokenizer
from fat5.errors import DataError
from fat5.tasks.finetune.config import FinetuneConfig
from fat5.tasks.finetune.examples import ExampleSet, cut_to, refuse_cut
from fat5.tasks.finetune.table import Table

ENCODED_AT_ONCE = 1024


class TextToText:
    """Columns `source` and `target`, with an optional prefix."""

    kind: ClassVar = "text"
    model: ClassVar = "ForConditionalGeneration"
    label_names: ClassVar[list[str] | None] = None

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer

    def learn(self, table: Table) -> None:
        """Nothing: the targets are texts."""

    def keys(self, table: Table) -> list[str]:
        """What decides which rows stay together when some are held out."""
        return self.inputs(table)

    def inputs(self, table: Table) -> list[str]:
        """What the model reads."""
        return [self.config.data.prefix + text for text in table.texts(self.config.data.columns.source)]

    def references(self, table: Table) -> list[Any]:
        """What it should write, as the metrics compare it."""
        return self.targets(table)

    def targets(self, table: Table) -> list[str]:
        """The text that is learned."""
        return table.texts(self.config.data.columns.target)

    def encode(self, table: Table) -> ExampleSet:
        """One example a row.

        Raises:
            DataError: an empty input or target, or one that is too long and `too_long` says refuse.
        """
        data, eos = self.config.data, self.tokenizer.info.eos_id
        sides, cut_rows = [], set()
        for side, texts, most in (
            ("source", self.inputs(table), data.max_source_tokens),
            ("target", self.targets(table), data.max_target_tokens),
        ):
            rows = [cut_to(ids.tolist(), most, [eos]) for ids in encode_all(self.tokenizer, texts)]
            long = [index for index, (_, was_cut) in enumerate(rows) if was_cut]
            if data.too_long == "refuse":
                refuse_cut([table.where(index) for index in long], most, side)
            cut_rows.update(long)
            sides.append([ids for ids, _ in rows])
        return ExampleSet.of(sides[0], sides[1], table.file, cut=len(cut_rows))


class Instructions(TextToText):
    """Columns `definition`, `examples` (optional), `input` and `output`, as in Super-NaturalInstructions."""

    def inputs(self, table: Table) -> list[str]:
        """Definition, worked examples, then the input."""
        columns = self.config.data.columns
        definitions, inputs = table.texts(columns.definition), table.texts(columns.input, required=False)
        texts = []
        for index, (definition, text) in enumerate(zip(definitions, inputs, strict=True)):
            shown = [f"Input: {one} Output: {other}" for one, other in self._examples(table, index)]
            parts = [definition, *shown, f"Input: {text} Output:"]
            texts.append(self.config.data.prefix + "\n\n".join(parts))
        return texts

    def references(self, table: Table) -> list[Any]:
        """The right outputs of each row, a list of texts."""
        column = self.config.data.columns.output
        found = []
        for index, value in enumerate(table.column(column)):
            texts = value if isinstance(value, list) else [value]
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                hint = "Give a text, or a list of texts"
                raise DataError(f"column {column!r} holds {value!r:.60}", where=table.where(index), hint=hint)
            found.append(texts)
        return found

    def targets(self, table: Table) -> list[str]:
        """The first of the right outputs."""
        return [texts[0] for texts in self.references(table)]

    def _examples(self, table: Table, index: int) -> list[tuple[str, str]]:
        column = self.config.data.columns.examples
        given = table.rows[index].get(column) if column else None
        pairs = []
        for example in given or []:
            if not isinstance(example, dict) or not {"input", "output"} <= example.keys():
                hint = "An example is {input: …, output: …}"
                raise DataError(f"column {column!r} holds {example!r:.60}", where=table.where(index), hint=hint)
            pairs.append((str(example["input"]), str(example["output"])))
        return pairs


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, without EOS."""
    found: list[np.ndarray] = []
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        tokens, lengths = tokenizer.encode_documents(texts[start : start + ENCODED_AT_ONCE])
        found += np.split(tokens, np.cumsum(lengths)[:-1])
    return found
