"""Whole files and folders, hashes, locks, refusal of pickles, and JSON that may be damaged or hostile."""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from fat5.errors import FAT5Error

WRITING, REMOVING = ".writing-", ".removing-"
"""Prefixes of a folder that is being written or removed; a crash may leave one behind."""

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
PICKLE_HEADS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # PK: a zip of pickles, by torch


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A hidden file to write to, which takes the name `path` at the end; until then the old file stays."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming(path):
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        fsync(path.parent)


def is_leftover(name: str) -> bool:
    """Whether an interrupted write may have left a file or folder of this name."""
    return name.startswith((WRITING, REMOVING)) or re.fullmatch(r"\..+\.\d+\.partial", name) is not None


def sweep(folder: Path) -> list[str]:
    """Removes what interrupted writes left in a folder; returns the names."""
    leftovers = sorted(entry for entry in folder.iterdir() if is_leftover(entry.name)) if folder.is_dir() else []
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    return [leftover.name for leftover in leftovers]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file, atomically, with a line a value."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_output(path: str | Path, content: str) -> None:
    """Writes a file that the user named: atomically, unless it is a device or a pipe."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with naming(path):
            path.write_text(content, encoding="utf-8")
    else:
        write_atomically(path, content)


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """A hidden folder to write to. It takes the name `target` at the end; until then, and after an error, the old
    folder stays.
    """
    target = Path(os.path.abspath(target))
    partial, old = target.with_name(WRITING + target.name), target.with_name(REMOVING + target.name)
    made = [parent for parent in target.parents if not parent.exists()]
    with naming(target):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                fsync(file)
            fsync(partial)
            if target.is_dir() and not any(target.iterdir()):  # perhaps the working directory of a shell, so it stays
                for file in sorted(partial.iterdir()):
                    file.rename(target / file.name)
            elif target.exists():
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
                partial.rename(target)
                shutil.rmtree(old)
            else:
                partial.rename(target)
            fsync(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):  # a parent that holds something stays
                for parent in made:
                    parent.rmdir()


def fsync(path: Path) -> None:
    """Makes the content of a file, or the names in a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds the file's name to an OSError without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:  # str() leaves the text out otherwise
            error.filename = str(path)
        raise


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds a lock file. The kernel frees it when this process ends, however that happens.

    Args:
        path: made if absent, and left there.
        wait: wait for another holder; goes on without a lock on a network file system that has none.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is False.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not wait:
                raise
        yield


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_pickle(path: Path, fault: type[FAT5Error]) -> None:
    """Raises `fault` if a file is a pickle, or a zip of pickles, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(PICKLE_HEADS):
        raise fault("a pickle, which FAT5 never loads: it can run code", where=path, hint="Use safetensors or JSON")


def parse_json(text: str | bytes, strict: bool = False) -> Any:
    """The content of a JSON text; `NaN` and `Infinity`, which Python writes, are read.

    Args:
        strict: refuse what `json` reads otherwise than it is written: a key twice in an object, half a surrogate pair.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply (which `json` alone raises as RecursionError).
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique if strict else None)
        if strict:
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair") from error
    return content


def read_object(path: Path, fault: type[FAT5Error], hint: str | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        fault: the file cannot be read, or holds something else, such as a pickle.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise fault(f"cannot be read ({error.strerror})", where=path, hint=hint) from error
    refuse_pickle(path, fault)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise fault("is not JSON", where=path, hint=hint) from error
    if not isinstance(content, dict):
        raise fault("is not a JSON object", where=path, hint=hint)
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return content


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value of a JSON file is a whole number from 0 to 2^63 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON file is a number that a float can hold, NaN and infinity included."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63
    )
