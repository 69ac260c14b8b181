"""Files and folders that appear whole or not at all, hashes, locks, and JSON that may be damaged or hostile."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with naming(path):
        try:
            with open(partial, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)


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
    """A hidden sibling to write files into; they come under the target's name when all went well, else they go.

    Args:
        target: absent, or an empty folder.
    """
    target = Path(os.path.abspath(target))
    partial = target.with_name(f".{target.name}.partial")
    with naming(target):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in partial.iterdir():
                sync_folder(file)
            if target.exists():  # perhaps the working directory of a shell, so the folder itself stays
                for file in sorted(partial.iterdir()):
                    file.rename(target / file.name)
            else:
                partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder, or the content of a file, last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Names the file in an OSError that does not, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply (which `json` alone raises as RecursionError).
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value of a JSON file is a whole number that fits into 63 bits, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a JSON file is a number that a float can hold; NaN and infinity are."""
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63
    )
