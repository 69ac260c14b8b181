"""Text to packed UL2 batches: corpora, tokenizer, shards, denoisers, packing, loading, audit.

Names are imported when first used, so that `import fat5.data` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "BatchConfig": "batch",
    "Denoiser": "denoisers",
    "DenoiserConfig": "denoisers",
    "Manifest": "shards",
    "MixtureOfDenoisers": "denoisers",
    "PackedBatch": "batch",
    "PackedLoader": "loader",
    "PaddedBatch": "padded",
    "PaddedLoader": "padded",
    "PieceStream": "order",
    "ShardEntry": "shards",
    "Source": "order",
    "TokenShards": "shards",
    "Tokenizer": "tokenizer",
    "TokenizerInfo": "tokenizer",
    "load_tokenizer": "tokenizer",
    "open_shards": "shards",
    "pack": "packing",
    "read_manifest": "shards",
    "reconstruct": "denoisers",
    "sample_path": "sample_corpus",
    "suggest_budgets": "packing",
    "unpack": "padded",
    "validation_batches": "validation",
    "verify": "shards",
}

if TYPE_CHECKING:
    from fat5.data.batch import BatchConfig, PackedBatch
    from fat5.data.denoisers import Denoiser, DenoiserConfig, MixtureOfDenoisers, reconstruct
    from fat5.data.loader import PackedLoader
    from fat5.data.order import PieceStream, Source
    from fat5.data.packing import pack, suggest_budgets
    from fat5.data.padded import PaddedBatch, PaddedLoader, unpack
    from fat5.data.sample_corpus import sample_path
    from fat5.data.shards import Manifest, ShardEntry, TokenShards, open_shards, read_manifest, verify
    from fat5.data.tokenizer import Tokenizer, TokenizerInfo, load_tokenizer
    from fat5.data.validation import validation_batches

__all__ = [
    "BatchConfig",
    "Denoiser",
    "DenoiserConfig",
    "Manifest",
    "MixtureOfDenoisers",
    "PackedBatch",
    "PackedLoader",
    "PaddedBatch",
    "PaddedLoader",
    "PieceStream",
    "ShardEntry",
    "Source",
    "TokenShards",
    "Tokenizer",
    "TokenizerInfo",
    "load_tokenizer",
    "open_shards",
    "pack",
    "read_manifest",
    "reconstruct",
    "sample_path",
    "suggest_budgets",
    "unpack",
    "validation_batches",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fat5.data' has no attribute {name!r}")
    value = getattr(import_module(f"fat5.data.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
