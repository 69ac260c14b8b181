"""Shards for gpu_training.py's section `pretrain`: the three sample corpora, paragraphs joined to documents of about a
thousand tokens, so that a GPU gets the examples that it would get from books and web pages.

    python benchmarks/gpu_shards.py FOLDER [--vocab_size 32768]
"""

import argparse
import gzip
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fat5.data import open_shards, sample_path
from fat5.data.shards.prepare import PrepareConfig, prepare
from fat5.data.text.corpus import SAMPLE_LANGUAGES
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer

CHARACTERS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab_size", type=int, default=32768)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "handbook.jsonl"
        joined = [document for language in SAMPLE_LANGUAGES for document in documents(language)]
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in joined), encoding="utf-8")
        tokenizer = Path(name) / "tokenizer"
        train_tokenizer(TokenizerTraining([str(text)], str(tokenizer), vocab_size=options.vocab_size))
        prepare(PrepareConfig([str(text)], str(tokenizer), str(options.folder), validation_fraction=0.03, workers=1))
    for split in ("train", "validation"):
        shards = open_shards(options.folder, split)
        print(f"{split}: {shards.num_documents:,} documents, {shards.num_tokens:,} tokens")


def documents(language: str) -> Iterator[str]:
    """Paragraphs that follow each other in a chapter, joined until they are long enough."""
    chapter, held = "", ""
    with gzip.open(sample_path(language), "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if held and (row["chapter"] != chapter or len(held) >= CHARACTERS):
                yield held
                held = ""
            chapter, held = row["chapter"], f"{held}\n\n{row['text']}".strip()
    if held:
        yield held


if __name__ == "__main__":
    main()
