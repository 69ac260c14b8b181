"""`fat5 prepare INPUT… --tokenizer DIR --output_dir DIR`: turn text into verified token shards."""

import sys

from fat5.cli.parsing import parse
from fat5.data.config import PrepareConfig


def main(argv: list[str]) -> int:
    """Prepares a corpus, and prints the sizes of both splits."""
    config = PrepareConfig(**parse(PrepareConfig, argv, "prepare", words="inputs"))
    from fat5.data import load_tokenizer
    from fat5.data.shards.prepare import prepare

    manifest = prepare(config, progress=sys.stderr.isatty())
    if manifest is None:
        print(f"submitted to Slurm; the last job writes {config.output_dir}/manifest.json")
        return 0
    for split in manifest.shards:
        documents, tokens, unknown = manifest.documents(split), manifest.tokens(split), manifest.unknown(split)
        missing = "" if unknown is None else f", {unknown:,} of them <unk>"
        print(f"{config.output_dir}/{split}: {documents:,} documents, {tokens:,} tokens{missing}")
    if any(manifest.unknown(split) for split in manifest.shards):
        print("<unk> stands for text that the tokenizer has no token for; a model cannot learn it")
    if manifest.bad_rows:
        first = f"{config.output_dir}/logs/bad_rows names the first of each task"
        print(f"rows that could not be read and were skipped: {manifest.bad_rows:,} ({first})")
    if not manifest.documents("validation"):
        print("the validation split is empty; raise --validation_fraction")
    if config.verify:
        print("every shard agrees with its SHA-256")
        return 0
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.own_opening:
        opening = tokenizer.decode(tokenizer.own_opening)
        print(f"training puts no {opening} before a text, nor does the tokenizer in {config.output_dir}/tokenizer")
    return 0
