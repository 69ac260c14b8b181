"""A small corpus on its way to shards and back, for the tests of preparing."""

import json
import os
import signal
from pathlib import Path

from fat5.data import load_tokenizer, open_shards
from fat5.data.shards.prepare import PrepareConfig


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def decoded(folder: Path, split: str) -> list[str]:
    tokenizer = load_tokenizer(folder / "tokenizer")
    return [tokenizer.decode(document) for document in open_shards(folder, split)]


def config(tmp_path: Path, tokenizer: str, inputs: object, **keys: object) -> PrepareConfig:
    names = [str(name) for name in (inputs if isinstance(inputs, list) else [inputs])]
    return PrepareConfig(names, tokenizer, str(tmp_path / "out"), **({"workers": 1} | keys))


def manifest(folder: Path) -> bytes:
    return (folder / "manifest.json").read_bytes()


def die(folder: str, stage: str, rank: int) -> None:
    """In place of run_task. A worker imports the module of its task, so it stands where little is imported."""
    os.kill(os.getpid(), signal.SIGKILL)
