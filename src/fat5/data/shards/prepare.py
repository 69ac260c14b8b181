"""`fat5 prepare`: from a corpus to a folder of verified token shards, with every executor the same.

`manifest.json` is written last, so a folder that has it is complete. Until then `logs/plan.json` holds the plan, and
the same command continues where it stopped.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fat5.data.config import PrepareConfig
from fat5.data.shards.plan import LOGS, PLAN, STEPS, difference, make_plan, read_plan, write_plan
from fat5.data.shards.progress import watch
from fat5.data.shards.token_shards import (
    MANIFEST,
    SPLITS,
    Manifest,
    ShardEntry,
    check_sizes,
    read_entry,
    read_manifest,
    verify,
)
from fat5.data.text.corpus import open_corpus
from fat5.data.text.rows import BadRows
from fat5.data.tokenizer.loading import load_tokenizer
from fat5.errors import ConfigurationError, DataError, FAT5Error, RunDirectoryError
from fat5.files import locked, parse_json, write_atomically
from fat5.machine import available_cores

LOCK = f"{LOGS}/lock"


def prepare(config: PrepareConfig, progress: bool = False) -> Manifest | None:
    """Prepares a corpus; returns the manifest, or None if Slurm finishes the work.

    Raises:
        ConfigurationError: a key has a value that cannot work.
        DataError: the corpus cannot be read. The folder is left without a manifest.
        TokenizerError: the tokenizer cannot be used.
        RunDirectoryError: `output_dir` holds something else, or another process is preparing it.
    """
    _check(config)
    folder = Path(config.output_dir)
    if config.verify:
        return verify(folder)
    _check_folder(folder)
    tokenizer = load_tokenizer(config.tokenizer)
    corpus = open_corpus(config.inputs, config.corpus)
    if corpus.dataset is not None and config.corpus.on_bad_row == "refuse":
        next(corpus.rows(1), None)  # so that a wrong column is found before any task starts
    if config.steps:
        from fat5.data.text.cleaning import check_models

        check_models(config.steps)
    plan = make_plan(corpus, config.name, config.steps, config.validation_fraction, tokenizer.info)
    fresh = not folder.exists()
    with _lock(folder):
        if (folder / PLAN).exists():
            found = difference(read_plan(folder.absolute()), plan)
            if found:
                hint = "Remove it to start anew, or choose a new --output_dir"
                raise RunDirectoryError(f"was begun with {found}", where=folder, hint=hint)
            if (folder / MANIFEST).exists():
                manifest = read_manifest(folder)
                check_sizes(folder, manifest)
                return manifest
        else:
            tokenizer.save(folder / "tokenizer")
            write_plan(plan, folder)
        try:
            with watch(folder, plan.bytes, progress):
                _run(str(folder.absolute()), config)
            return None if config.executor == "slurm" else finish(folder)
        except FAT5Error:
            if not any((folder / LOGS / "shards").glob("*.json")):
                for name in (LOGS, "tokenizer", *SPLITS):
                    shutil.rmtree(folder / name, ignore_errors=True)
                if fresh:
                    shutil.rmtree(folder, ignore_errors=True)
            raise


def finish(folder: Path) -> Manifest:
    """Writes the manifest after the last task; DataError if tasks are missing, or no document had any text."""
    plan = read_plan(folder.absolute())
    shards: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    for rank in range(len(plan.tasks)):
        path = folder / LOGS / "shards" / f"{rank:05d}.json"
        if not path.exists():
            raise DataError(
                f"task {rank} of {len(plan.tasks)} is not done", where=folder, hint="Run fat5 prepare again"
            )
        with _record(path) as entries:
            for split, entry in entries.items():
                if entry:
                    shards[split].append(read_entry(entry))
    skipped = []
    for path in sorted((folder / LOGS / "bad_rows").glob("*.json")):
        with _record(path) as bad_rows:
            skipped.append(BadRows(**bad_rows))
    manifest = Manifest(
        name=plan.name,
        tokenizer_sha256=plan.tokenizer_sha256,
        vocab_size=plan.vocab_size,
        token_bytes=plan.token_bytes,
        validation_fraction=plan.validation_fraction,
        shards=shards,
        steps=plan.steps,
        bad_rows=sum(task.count for task in skipped),
    )
    if not any(manifest.tokens(split) for split in SPLITS):
        for path in (folder / LOGS / "shards").glob("*.json"):
            path.unlink()
        why = "No document passed the steps" if plan.steps else "Every document is empty"
        if manifest.bad_rows:
            first = next(task.first for task in skipped if task.count)
            why = f"Rows skipped: {manifest.bad_rows:,}; the first: {first}"
        raise DataError("no text in this corpus", where=plan.name, hint=why)
    check_sizes(folder, manifest)
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
        for partial in (folder / split).glob(".*.partial"):
            partial.unlink(missing_ok=True)
    shutil.rmtree(folder / LOGS / "minhash", ignore_errors=True)
    write_atomically(folder / MANIFEST, manifest.to_json().encode("utf-8"))
    return manifest


@contextmanager
def _record(path: Path) -> Iterator[dict[str, Any]]:
    """What a task wrote at its end; DataError if it, or a value that the body finds in it, is damaged."""
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise TypeError("not an object")
        yield content
    except (ValueError, KeyError, TypeError) as error:
        raise DataError("damaged", where=path, hint="Remove the whole folder, and run fat5 prepare again") from error


def _run(folder: str, config: PrepareConfig) -> None:
    from fat5.data.shards import executors

    if config.executor == "slurm":
        executors.submit_slurm(folder, config.workers or -1, config.slurm)
    elif config.executor == "ray":
        executors.run_ray(folder, config.workers or available_cores())
    else:
        executors.run_local(folder, config.workers or available_cores())


def _check(config: PrepareConfig) -> None:
    if not config.output_dir:
        raise ConfigurationError("no output_dir", hint="Give --output_dir DIR, where the shards go")
    if config.verify:
        return
    if not config.tokenizer:
        raise ConfigurationError("no tokenizer", hint="Train one with `fat5 tokenizer` and give --tokenizer DIR")
    if not 0 <= config.validation_fraction < 1:
        raise ConfigurationError(
            f"validation_fraction {config.validation_fraction} is not in [0, 1)",
            hint="0.01 holds out one in a hundred",
        )
    if config.workers < 0:
        raise ConfigurationError(f"workers {config.workers} is negative", hint="0 means one per core")
    for spec in config.steps:
        name, _, argument = spec.partition("=")
        if name not in STEPS:
            raise ConfigurationError(f"no cleaning step {name!r}", hint=f"Choose from {', '.join(STEPS)}")
        if (name == "language") != bool(argument):
            raise ConfigurationError(f"step {spec!r} is not complete", hint="Write language=fr; others take no value")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunDirectoryError("is a file", where=folder, hint="Choose a new --output_dir")
    if folder.exists() and not (folder / PLAN).exists():
        others = [path.name for path in folder.iterdir() if path.name not in (LOGS, "tokenizer")]
        if others or ((folder / "tokenizer").exists() and not (folder / LOGS).exists()):
            raise RunDirectoryError("holds something else", where=folder, hint="Choose a new or empty --output_dir")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keeps other processes from preparing the folder."""
    with ExitStack() as stack:
        try:
            (folder / LOGS).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / LOCK, wait=False))
        except BlockingIOError as error:
            raise RunDirectoryError("is being prepared by another process", where=folder) from error
        except OSError as error:
            raise RunDirectoryError(f"cannot be written ({error.strerror})", where=folder) from error
        yield
