"""`fat5 tokenizer INPUT… --output_dir DIR`: train a tokenizer on your text."""

import sys

from fat5.cli.parsing import parse
from fat5.data.config import TokenizerTraining


def main(argv: list[str]) -> int:
    """Trains a tokenizer, and prints tokens per word and per byte."""
    config = TokenizerTraining(**parse(TokenizerTraining, argv, "tokenizer", words="inputs"))
    from fat5.data.tokenizer.training import train_tokenizer

    report = train_tokenizer(config, progress=sys.stderr.isatty())
    if report["bad_rows"]:
        print(f"rows that could not be read and were skipped: {report['bad_rows']:,}")
    asked = config.vocab_size
    if report["vocab_size"] < asked:
        print(f"this corpus gives {report['vocab_size']:,} tokens, fewer than the {asked:,} asked for")
    print(
        f"{config.output_dir}: {config.model}, {report['vocab_size']:,} ids; on {report['documents']:,} documents "
        f"{report['tokens_per_word']:.2f} tokens a word, {report['tokens_per_byte']:.3f} a byte, "
        f"{report['unknown_rate']:.2%} unknown, {report['byte_fallback_rate']:.3%} written as bytes"
    )
    return 0
