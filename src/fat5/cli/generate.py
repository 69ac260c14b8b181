"""`fat5 generate`: completes prompts given as words, in a file, or on standard input."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from fat5.cli.parsing import parse
from fat5.errors import ConfigurationError, DataError, check_writable
from fat5.files import write_output
from fat5.generate import Decoding

# A prompt fits one context window; a longer line means that the file is no list of prompts.
LONGEST_PROMPT = 1_000_000


@dataclass
class GenerateConfig(Decoding):
    """Fill the blanks of texts (___ or <extra_id_0>), continue texts, or pass them to a fine-tuned model."""

    model: str = ""
    """Folder of a model, or of a run (its model/ is taken)"""
    prompts: list[str] = field(default_factory=list)
    """The texts; by default the lines of standard input"""
    input: str | None = None
    """File of prompts, one a line (UTF-8)"""
    output: str | None = None
    """File for the answers, one a line; by default standard output"""
    mode: Literal["auto", "infill", "continue", "text"] = "auto"
    """text passes the prompt behind the prefix (fine-tuned tasks); auto is text for a fine-tuned model, infill for one
    with a blank, else continue"""
    mode_token: str | None = None
    """First token of the input: [R], [S], [X] or "" for none; by default [R] for infill and [S] for continue"""
    prefix: str | None = None
    """Stands before a prompt in mode text; by default that of the model's task"""
    json_lines: bool = False
    """Write a line {"prompt", "completion", "text"} instead of the text alone"""
    device: str = "auto"
    """auto (CUDA if available), cpu or cuda"""


def main(argv: list[str]) -> int:
    """Completes and prints."""
    config = GenerateConfig(**parse(GenerateConfig, argv, "generate", words="prompts"))
    if not config.model:
        raise ConfigurationError("no model", hint="Say which with --model DIR; `fat5 demo` makes one")
    if config.output is not None:
        check_writable(config.output)
    texts = list(read_prompts(config.prompts, config.input))
    if not texts:
        raise DataError("no prompt", hint=f"Give one: fat5 generate --model {config.model} 'Le noyau ___ est libre.'")
    from fat5.data import load_tokenizer
    from fat5.generate import complete
    from fat5.model import load_model
    from fat5.train.checkpoint.store import model_folder

    folder = model_folder(Path(config.model))
    answers = complete(
        load_model(folder, device=config.device),
        load_tokenizer(folder),
        texts,
        mode=config.mode,
        mode_token=config.mode_token,
        prefix=config.prefix,
        decoding=config,
    )
    lines = [
        json.dumps(asdict(answer), ensure_ascii=False) if config.json_lines else answer.text.replace("\n", "\\n")
        for answer in answers
    ]
    if config.output is None:
        print("\n".join(lines))
    else:
        write_output(config.output, "\n".join(lines) + "\n")
    return 0


def read_prompts(words: list[str], file: str | None) -> Iterator[str]:
    """The prompts: the words given, else the lines of a file, else of standard input; empty lines are skipped.

    Raises:
        ConfigurationError: both words and a file.
        DataError: a file that cannot be read, a line that is too long or not UTF-8, with its number.
    """
    if words and file:
        raise ConfigurationError("prompts given both as words and with --input", hint="Give one of the two")
    if words:
        yield from words
    elif file is not None:
        try:
            with open(file, "rb") as stream:
                yield from _lines(stream, file)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", where=file) from error
    elif not sys.stdin.isatty():
        yield from _lines(sys.stdin.buffer, "standard input")


def _lines(stream: BinaryIO, where: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST_PROMPT + 1), b""), 1):
        if len(line) > LONGEST_PROMPT:
            raise DataError("a line of over 1 MB", where=f"{where}:{number}", hint="One prompt a line")
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError("not UTF-8", where=f"{where}:{number}", hint="Convert the file to UTF-8") from error
        if text.strip():
            yield text
