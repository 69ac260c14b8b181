"""Text in, text out: translation, summarisation, correction, and instructions with worked examples."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from fat5.data import Tokenizer
from fat5.errors import ConfigurationError
from fat5.tasks.finetune.config import FinetuneConfig
from fat5.tasks.finetune.examples import ExampleSet, Form, cut_to, refuse_cut, refuse_no_tokens
from fat5.tasks.finetune.table import Table

ENCODED_AT_ONCE = 1024


class TextToText(Form):
    """Columns `source` and `target`, with an optional prefix."""

    kind: ClassVar = "text"
    model: ClassVar = "ForConditionalGeneration"
    pipeline: ClassVar = "text2text-generation"

    def inputs(self, table: Table) -> list[str]:
        return [self.config.data.prefix + text for text in table.texts(self.config.data.columns.source)]

    def references(self, table: Table) -> list[Any]:
        return self.targets(table)

    @property
    def columns(self) -> dict[str, str]:
        """The columns of source and target."""
        columns = self.config.data.columns
        return {"source": columns.source, "target": columns.target}

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
        check_prefix(self.config, self.tokenizer)
        for side, texts, most in (
            ("source", self.inputs(table), data.max_source_tokens),
            ("target", self.targets(table), data.max_target_tokens),
        ):
            encoded = encode_all(self.tokenizer, texts)
            refuse_no_tokens(encoded, table.where, self.columns[side])
            rows = [cut_to(ids.tolist(), most, [eos]) for ids in encoded]
            long = [index for index, (_, was_cut) in enumerate(rows) if was_cut]
            if data.too_long == "refuse":
                refuse_cut([table.where(index) for index in long], most, side)
            cut_rows.update(long)
            sides.append([ids for ids, _ in rows])
        return ExampleSet.of(sides[0], sides[1], table.parts, cut=len(cut_rows))


class Instructions(TextToText):
    """Columns `definition`, `examples` (optional), `input` and `output`, as in Super-NaturalInstructions."""

    def inputs(self, table: Table) -> list[str]:
        """Definition, worked examples, then the input. Examples that would push the input out are left out, the last
        one first.
        """
        columns = self.config.data.columns
        definitions, inputs = table.texts(columns.definition), table.texts(columns.input, required=False)
        shown = [
            [f"Input: {one} Output: {other}" for one, other in self._examples(table, index)]
            for index in range(len(table))
        ]
        texts = [self._join(*parts) for parts in zip(definitions, shown, inputs, strict=True)]
        room = self.config.data.max_source_tokens - 1
        for index, ids in enumerate(encode_all(self.tokenizer, texts)):
            length = len(ids)
            while length > room and shown[index]:
                shown[index].pop()
                texts[index] = self._join(definitions[index], shown[index], inputs[index])
                length = len(self.tokenizer.encode(texts[index]))
        return texts

    @property
    def columns(self) -> dict[str, str]:
        """The columns that source and target end with."""
        columns = self.config.data.columns
        return {"source": columns.input, "target": columns.output}

    def _join(self, definition: str, shown: list[str], text: str) -> str:
        return self.config.data.prefix + "\n\n".join([definition, *shown, f"Input: {text} Output:"])

    def references(self, table: Table) -> list[Any]:
        """The right outputs of each row, a list of texts."""
        column = self.config.data.columns.output
        found = []
        for index, value in enumerate(table.column(column)):
            texts = value if isinstance(value, list) else [value]
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise table.odd(index, column, "Give a text, or a list of texts")
            found.append(texts)
        return found

    def targets(self, table: Table) -> list[str]:
        """The first of the right outputs."""
        return [texts[0] for texts in self.references(table)]

    def _examples(self, table: Table, index: int) -> list[tuple[str, str]]:
        column = self.config.data.columns.examples
        if column is None or column.split(".")[0] not in table.rows[index]:
            return []
        given = table.value(index, column)
        if given is None:
            return []
        pairs = []
        for example in given if isinstance(given, list) else [given]:
            one, other = (example.get(key) if isinstance(example, dict) else None for key in ("input", "output"))
            if not isinstance(one, str) or not isinstance(other, str):
                raise table.odd(index, column, "Give a list of {input: text, output: text}")
            pairs.append((one, other))
        return pairs


def check_prefix(config: FinetuneConfig, tokenizer: Tokenizer) -> None:
    """Raises ConfigurationError if `data.prefix` leaves no room for a text."""
    data = config.data
    if data.prefix and (length := len(tokenizer.encode(data.prefix))) >= data.max_source_tokens - 1:
        raise ConfigurationError(
            f"has {length:,} tokens, and max_source_tokens is {data.max_source_tokens:,}",
            where="prefix",
            hint="Raise max_source_tokens, or shorten the prefix",
        )


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, without EOS."""
    starts = range(0, len(texts), ENCODED_AT_ONCE)
    return [ids for start in starts for ids in tokenizer.encode_each(texts[start : start + ENCODED_AT_ONCE])]
