"""Text to packed UL2 batches: corpora, tokenizer, shards, denoisers, packing, loading, audit.

Names are imported when first used, so that `import fat5.data` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "BatchConfig": "batch",
    "Denoiser": "denoisers",
    "Manifest": "shards",
    "MixtureOfDenoisers": "denoisers",
    "PackedBatch": "batch",
    "PackedLoader": "loader",
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
    "verify": "shards",
}

if TYPE_CHECKING:
    from fat5.data.batch import BatchConfig, PackedBatch
    from fat5.data.denoisers import Denoiser, MixtureOfDenoisers, reconstruct
    from fat5.data.loader import PackedLoader
    from fat5.data.order import PieceStream, Source
    from fat5.data.packing import pack, suggest_budgets
    from fat5.data.sample_corpus import sample_path
    from fat5.data.shards import Manifest, ShardEntry, TokenShards, open_shards, read_manifest, verify
    from fat5.data.tokenizer import Tokenizer, TokenizerInfo, load_tokenizer

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fat5.data' has no attribute {name!r}")
    value = getattr(import_module(f"fat5.data.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
