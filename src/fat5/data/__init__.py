"""Data: corpus → tokenizer → token shards → denoised, packed batches. Imports nothing until a name is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Public name → module that defines it.
_HOMES = {
    "Manifest": "shards",
    "ShardEntry": "shards",
    "TokenShards": "shards",
    "open_shards": "shards",
    "read_manifest": "shards",
    "verify": "shards",
    "Tokenizer": "tokenizer",
    "TokenizerInfo": "tokenizer",
    "load_tokenizer": "tokenizer",
    "sample_path": "sample_corpus",
}

if TYPE_CHECKING:
    from fat5.data.sample_corpus import sample_path
    from fat5.data.shards import Manifest, ShardEntry, TokenShards, open_shards, read_manifest, verify
    from fat5.data.tokenizer import Tokenizer, TokenizerInfo, load_tokenizer

__all__ = [
    "Manifest",
    "ShardEntry",
    "TokenShards",
    "Tokenizer",
    "TokenizerInfo",
    "load_tokenizer",
    "open_shards",
    "read_manifest",
    "sample_path",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"fat5.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fat5.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
