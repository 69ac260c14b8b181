"""The datatrove pipeline behind `fat5 prepare`: read → clean → (drop near-duplicates) → tokenize and write shards.

`stages(plan)` lists the stages in order. Each is a number of independent tasks, which datatrove's executors run and
mark as completed. A task depends on the folder's plan alone.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

# loguru would write the values of variables (whole documents) into tracebacks.
os.environ.setdefault("LOGURU_DIAGNOSE", "NO")

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from fat5.data.shards.plan import LOGS, PreparePlan, read_plan
from fat5.data.shards.progress import TaskProgress
from fat5.data.shards.token_shards import SPLITS
from fat5.data.text.corpus import Corpus
from fat5.data.text.rows import Chunk
from fat5.data.tokenizer.loading import Tokenizer, load_tokenizer
from fat5.errors import DataError
from fat5.files import whole_file, write_atomically

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 8192
MINHASH_BUCKETS = 14


@dataclass(frozen=True)
class Stage:
    """One stage: its name (also its folder in `logs/`), and its number of tasks."""

    name: str
    tasks: int


def stages(plan: PreparePlan) -> list[Stage]:
    """The stages of a plan in order; each needs all tasks of the previous one."""
    before = []
    if plan.deduplicated:
        before = [
            Stage("signatures", len(plan.tasks)),
            Stage("buckets", MINHASH_BUCKETS),
            Stage("clusters", 1),
        ]
    return [*before, Stage("tokens", len(plan.tasks))]


def build(folder: str, stage: str) -> list[Any]:
    """The datatrove pipeline of one stage, for one task: some steps count as they run."""
    plan = read_plan(folder)
    columns = ("url",) if "urls" in plan.steps else ()
    read: list[Any] = [CorpusReader(folder, columns)]
    if plan.steps:
        from fat5.data.text.cleaning import build_step

        read += [build_step(spec) for spec in plan.steps if spec != "minhash"]
    if not plan.deduplicated:
        return [*read, ShardWriter(folder)]
    from datatrove.pipeline import dedup
    from datatrove.pipeline.dedup.minhash import MinhashConfig

    from fat5.data.text.cleaning import UnicodeWords

    config = MinhashConfig(num_buckets=MINHASH_BUCKETS)
    work = f"{folder}/{LOGS}/minhash"
    if stage == "signatures":
        return [*read, dedup.MinhashDedupSignature(f"{work}/signatures", config, language=UnicodeWords())]
    if stage == "buckets":
        return [dedup.MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=config)]
    if stage == "clusters":
        return [dedup.MinhashDedupCluster(f"{work}/buckets", f"{work}/remove", config=config)]
    return [*read, dedup.MinhashDedupFilter(f"{work}/remove"), ShardWriter(folder)]


class CorpusReader(PipelineStep):
    """Reads the chunks of one task, and writes its progress to `logs/progress/RANK.json`."""

    name = "Corpus"
    type = "📖 - READER"

    def __init__(self, folder: str, columns: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.folder = folder
        self.columns = columns

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents of task `rank`; counts those without text, and leaves them out."""
        plan = read_plan(self.folder)
        corpus = Corpus(plan.options, dataset=plan.dataset)
        progress = TaskProgress(self.folder, rank)
        empty = done = 0
        for chunk in [Chunk(plan.dataset, rank, len(plan.tasks), 0)] if plan.dataset else plan.tasks[rank]:
            for row in corpus.read(chunk, self.columns):
                if not row.text:
                    empty += 1
                    continue
                progress.documents += 1
                if not progress.documents & 255:
                    progress.tell(done + min(max(row.position - chunk.start, 0), chunk.bytes))
                yield Document(text=row.text, id=f"{chunk.path}@{row.position}", metadata=row.columns)
            done += chunk.bytes
        progress.tell(done, final=True)
        skipped = Path(self.folder) / LOGS / "bad_rows" / f"{rank:05d}.json"  # comes before the shards' own record
        skipped.parent.mkdir(exist_ok=True)
        write_atomically(skipped, json.dumps(asdict(corpus.bad_rows), ensure_ascii=False))
        self.stat_update("documents", value=progress.documents)
        self.stat_update("empty_documents", value=empty)


class ShardWriter(PipelineStep):
    """Tokenizes documents in batches, and writes one shard per split with its entry of the manifest."""

    name = "Shards"
    type = "🔢 - TOKENIZER"

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Writes the shards of task `rank`; yields nothing."""
        plan = read_plan(self.folder)
        tokenizer = _tokenizer(self.folder, plan.tokenizer_sha256)
        folder = Path(self.folder)
        unk = tokenizer.info.unk_id
        with ExitStack() as files:
            parts = {split: _ShardFile(folder, split, rank, plan.token_bytes, unk, files) for split in SPLITS}
            for texts in _batches(data):
                tokens, lengths = tokenizer.encode_documents(texts)
                held_out = plan.held_out(texts)
                if held_out.any():
                    chosen = np.repeat(held_out, lengths)
                    parts["validation"].write(tokens[chosen], lengths[held_out])
                    tokens, lengths = tokens[~chosen], lengths[~held_out]
                parts["train"].write(tokens, lengths)
            entries = {split: part.finish() for split, part in parts.items()}
        (folder / LOGS / "shards").mkdir(exist_ok=True)
        write_atomically(folder / LOGS / "shards" / f"{rank:05d}.json", json.dumps(entries).encode())
        for split, entry in entries.items():
            if entry:
                self.stat_update(f"{split}_tokens", value=entry["tokens"])
        yield from ()


class _ShardFile:
    """A `.ds` file, hashed while it is written. It takes its name when `files` closes."""

    def __init__(self, folder: Path, split: str, rank: int, token_bytes: int, unk_id: int, files: ExitStack) -> None:
        self.name = f"{split}/{rank:05d}.ds"
        self.path = folder / self.name
        self.token_bytes, self.unk_id = token_bytes, unk_id
        self.tokens = self.unknown = 0
        self._ends: list[np.ndarray] = []
        self._digest = hashlib.sha256()
        self._files = files
        self._file: BinaryIO | None = None

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        if not len(lengths):
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._files.enter_context(whole_file(self.path))
        content = np.ascontiguousarray(tokens).data
        self._file.write(content)
        self._digest.update(content)
        self._ends.append((np.cumsum(lengths) + self.tokens).astype("<u8"))
        self.tokens += int(lengths.sum())
        self.unknown += int((tokens == self.unk_id).sum())

    def finish(self) -> dict[str, Any] | None:
        """Writes the index; returns the manifest entry, or None if nothing was written."""
        if self._file is None:
            return None
        ends = np.concatenate(self._ends)
        write_atomically(self.path.with_name(f"{self.path.name}.index"), ends.tobytes())
        return {
            "file": self.name,
            "documents": len(ends),
            "tokens": self.tokens,
            "bytes": self.tokens * self.token_bytes,
            "sha256": self._digest.hexdigest(),
            "index_sha256": hashlib.sha256(ends.tobytes()).hexdigest(),
            "unknown": self.unknown,
        }


@lru_cache(maxsize=1)
def _tokenizer(folder: str, sha256: str) -> Tokenizer:
    tokenizer = load_tokenizer(f"{folder}/tokenizer")
    if tokenizer.info.sha256 != sha256:
        raise DataError("the tokenizer in this folder has changed", where=f"{folder}/tokenizer", hint="Prepare anew")
    return tokenizer


def _batches(documents: Any) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts
