"""The plan of `fat5 prepare`: the files, tasks and options. It depends on the corpus and the options alone.

The plan is written to `logs/plan.json` before the first task, and every process on every machine works from it. Tasks
do not depend on the number of workers, so shards do not either.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fat5.data.text.corpus import Corpus, load_streamed
from fat5.data.text.rows import Chunk, CorpusOptions
from fat5.data.tokenizer.loading import TokenizerInfo
from fat5.errors import RunDirectoryError
from fat5.files import is_count, parse_json, write_atomically

VERSION = 1
STEPS = ("language", "c4", "gopher_quality", "gopher_repetition", "urls", "pii", "minhash")
LOGS = "logs"
PLAN = f"{LOGS}/plan.json"


@dataclass(frozen=True)
class PreparePlan:
    """Everything that determines the shards."""

    name: str
    dataset: str | None
    files: list[list[Any]]
    corpus: dict[str, Any]
    steps: list[str]
    validation_fraction: float
    tokenizer_sha256: str
    vocab_size: int
    token_bytes: int
    tasks: list[list[Chunk]]

    @property
    def options(self) -> CorpusOptions:
        """How to read the corpus."""
        return CorpusOptions(**self.corpus)

    @property
    def bytes(self) -> int:
        """Bytes to read over all tasks; 0 for a streamed dataset."""
        return sum(chunk.bytes for task in self.tasks for chunk in task)

    @property
    def deduplicated(self) -> bool:
        """Whether near-duplicates are removed, which takes further stages."""
        return "minhash" in self.steps

    def held_out(self, texts: Sequence[str]) -> np.ndarray:
        """Which documents go to validation, (len(texts),) bool; more text never moves one to the other split.

        A hash of the text chooses.
        """
        limit = int(self.validation_fraction * (1 << 64))
        digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
        return np.fromiter((int.from_bytes(digest, "little") < limit for digest in digests), bool, len(texts))


def make_plan(
    corpus: Corpus, name: str, steps: list[str], validation_fraction: float, tokenizer: TokenizerInfo
) -> PreparePlan:
    """The plan for a corpus; files are known by absolute path, size and modification time."""
    files = [os.path.abspath(path) for path in corpus.files]
    if corpus.dataset is None:
        tasks = Corpus(corpus.options, files).tasks()
    else:
        tasks = [[] for _ in range(max(1, int(load_streamed(corpus.dataset, corpus.options).num_shards)))]
    stats = [os.stat(path) for path in files]
    return PreparePlan(
        name=name or corpus.name,
        dataset=corpus.dataset,
        files=[[path, stat.st_size, stat.st_mtime_ns] for path, stat in zip(files, stats, strict=True)],
        corpus=asdict(corpus.options),
        steps=steps,
        validation_fraction=validation_fraction,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        token_bytes=tokenizer.token_bytes,
        tasks=tasks,
    )


def write_plan(plan: PreparePlan, folder: Path) -> None:
    """Writes `logs/plan.json`, atomically."""
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PLAN, json.dumps({"version": VERSION} | asdict(plan), ensure_ascii=False).encode())


def read_plan(folder: str | Path) -> PreparePlan:
    """The plan of a folder that `fat5 prepare` began; RunDirectoryError if there is none of this version."""
    path = Path(folder) / PLAN
    try:
        return _read_plan(str(path), path.stat().st_mtime_ns)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError("no plan of fat5 prepare that this version reads", where=path) from error


@lru_cache(maxsize=2)
def _read_plan(path: str, _modified: int) -> PreparePlan:
    content = parse_json(Path(path).read_bytes())
    if content.pop("version") != VERSION:
        raise KeyError("version")
    content["tasks"] = [[Chunk(**chunk) for chunk in task] for task in content["tasks"]]
    plan = PreparePlan(**content)
    CorpusOptions(**plan.corpus)
    sizes = all(is_count(chunk.bytes) for task in plan.tasks for chunk in task)
    if not sizes or not all(isinstance(step, str) for step in plan.steps):
        raise TypeError("a value of another type")
    return plan


def difference(old: PreparePlan, new: PreparePlan) -> str | None:
    """The first difference between two plans in words, or None."""
    words = {
        "tokenizer_sha256": "another tokenizer",
        "dataset": "another dataset",
        "files": "other files, or the files have changed",
        "corpus": "other corpus options",
        "steps": "other steps",
        "validation_fraction": "another validation_fraction",
        "name": "another name",
        "tasks": "another division into tasks",
    }
    return next((said for key, said in words.items() if getattr(old, key) != getattr(new, key)), None)
