"""Writes a checkpoint folder, complete or not at all, and verifies one before it is used.

A checkpoint is written to a hidden sibling; each file is flushed to the disk; the manifest, with the size and SHA-256
of every file, is written last; then the folder is renamed and its parent flushed. A crash at any point leaves either a
hidden leftover, which is swept at the next start, or a complete checkpoint. Nothing in it is a pickle: tensors are
safetensors, all else is JSON.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fat5.errors import CheckpointError, CheckpointVersionError
from fat5.files import (
    PICKLE_SUFFIXES,
    REMOVING,
    file_sha256,
    fsync,
    is_count,
    is_number,
    read_object,
    whole_folder,
)

MANIFEST = "manifest.json"
FORMAT = "fat5-checkpoint"
VERSION = 1


def reached(point: str) -> None:
    """A named point inside a save; does nothing. The fault tests put a kill here."""


def write_checkpoint(
    target: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, str],
    facts: Mapping[str, Any],
) -> None:
    """Makes the folder `target`, complete and on the disk when this returns; one that stood there is replaced.

    Args:
        tensors, documents: file name → tensors on the host, and file name → text.
        facts: further entries of the manifest (step, validation loss).

    Raises:
        OSError: the disk is full, read-only, or failing. Nothing is left behind then.
    """
    with whole_folder(target) as partial:
        files = {}
        contents: dict[str, Mapping[str, Tensor] | str] = {**tensors, **documents}
        for name, content in contents.items():
            reached(f"before {name}")
            _write(partial / name, content)
            reached(f"before fsync of {name}")
            fsync(partial / name)
            files[name] = {"bytes": (partial / name).stat().st_size, "sha256": file_sha256(partial / name)}
            reached(f"after {name}")
        manifest = {"format": FORMAT, "version": VERSION, **facts, "files": files}
        reached("before manifest")
        manifest["sha256"] = _self_sha256(manifest)
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        reached("before rename")
    reached("after rename")


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; after a crash in the middle, the rest is not taken for a checkpoint."""
    reached("before removing")
    hidden = folder.with_name(f"{REMOVING}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    reached("while removing")
    shutil.rmtree(hidden)
    reached("after removing")


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest, which is returned.

    Raises:
        CheckpointError: the first file that is missing, cut or altered (named), or a format this version cannot read.
    """
    if folder.suffix in PICKLE_SUFFIXES or folder.is_file():
        raise CheckpointError(
            "is a file, and a checkpoint is a folder; pickles are never read",
            where=folder,
            hint="Give a folder checkpoints/step-N",
        )
    if not folder.exists():
        beside = ", ".join(sorted(path.name for path in folder.parent.glob("step-*")))
        raise CheckpointError("no such checkpoint", where=folder, hint=f"There is {beside}" if beside else None)
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(f"has {size:,} bytes where its manifest says {expected['bytes']:,}", where=path)
            digest = file_sha256(path)
        except OSError as error:
            raise CheckpointError(f"cannot be read ({error.strerror})", where=path) from error
        if digest != expected["sha256"]:
            raise CheckpointError("is damaged: its SHA-256 is not the manifest's", where=path)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; its files are not read.

    Raises:
        CheckpointError: missing, damaged, or (CheckpointVersionError) of another format version.
    """
    path = folder / MANIFEST
    manifest = read_object(path, CheckpointError)
    if manifest.get("format") != FORMAT:
        raise CheckpointError("is not the manifest of a FAT5 checkpoint", where=path)
    version = manifest.get("version")
    if version != VERSION:
        sound = is_count(version) and manifest.get("sha256") in (None, _self_sha256(manifest))
        fault = CheckpointVersionError if sound else CheckpointError
        raise fault(
            f"has format version {manifest.get('version')}, and this FAT5 reads version {VERSION}",
            where=path,
            hint="Continue with the FAT5 that wrote it",
        )
    if manifest.get("sha256") != _self_sha256(manifest):
        raise CheckpointError("is damaged: its own SHA-256 differs", where=path)
    _check_types(manifest, path)
    return manifest


def _check_types(manifest: Mapping[str, Any], path: Path) -> None:
    """An attacker can forge the hash of a manifest too, so each value that is used must have its type."""
    files, step, loss = manifest.get("files"), manifest.get("step"), manifest.get("val_loss")
    if not is_count(step):
        raise CheckpointError(f"has no step (step is {_shown(step)})", where=path)
    if loss is not None and not is_number(loss):
        raise CheckpointError(f"val_loss is {_shown(loss)}, which is no number", where=path)
    if not isinstance(files, dict):
        raise CheckpointError("names no files", where=path)
    for name, entry in files.items():
        if Path(name).name != name or name in ("", ".."):
            raise CheckpointError("names files outside its folder", where=path)
        known = isinstance(entry, dict) and is_count(entry.get("bytes")) and isinstance(entry.get("sha256"), str)
        if not known:
            raise CheckpointError(f"says {_shown(entry)} of {name}, which is no size and SHA-256", where=path)


def _shown(value: object) -> str:
    return repr(value)[:60]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: missing, or not safetensors; a pickle under this name is refused unread.
    """
    try:
        return load_file(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror or error})", where=path) from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"is not a safetensors file ({error}); pickles are never read", where=path) from error


def _self_sha256(manifest: Mapping[str, Any]) -> str:
    """Hash of a manifest's content without this hash; a flipped byte in it would else pass as another value."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: Mapping[str, Tensor] | str) -> None:
    if isinstance(content, str):
        path.write_text(content)
        return
    try:
        save_file(dict(content), path, metadata={"format": "pt"})
    except SafetensorError as error:  # its only fault here is the disk's
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise OSError(f"{path.name} cannot be written: {error}") from error
