"""Text to packed UL2 batches, in four rooms: text, tokenizer, shards, examples."""

from typing import TYPE_CHECKING

from fat5.lazy import lazy

if TYPE_CHECKING:
    from fat5.data.examples.batch import PackedBatch as PackedBatch
    from fat5.data.examples.collator import DataCollatorForUL2 as DataCollatorForUL2
    from fat5.data.examples.config import BatchConfig as BatchConfig
    from fat5.data.examples.config import DenoiserConfig as DenoiserConfig
    from fat5.data.examples.datasets import UL2Dataset as UL2Dataset
    from fat5.data.examples.datasets import UL2Examples as UL2Examples
    from fat5.data.examples.denoisers import Denoiser as Denoiser
    from fat5.data.examples.denoisers import MixtureOfDenoisers as MixtureOfDenoisers
    from fat5.data.examples.denoisers import reconstruct as reconstruct
    from fat5.data.examples.loader import PackedLoader as PackedLoader
    from fat5.data.examples.order import PieceStream as PieceStream
    from fat5.data.examples.order import WeightedShards as WeightedShards
    from fat5.data.examples.packing import pack as pack
    from fat5.data.examples.packing import suggest_budgets as suggest_budgets
    from fat5.data.examples.padded import PaddedBatch as PaddedBatch
    from fat5.data.examples.padded import PaddedLoader as PaddedLoader
    from fat5.data.examples.padded import unpack as unpack
    from fat5.data.examples.validation import validation_batches as validation_batches
    from fat5.data.shards.token_shards import Manifest as Manifest
    from fat5.data.shards.token_shards import TokenShards as TokenShards
    from fat5.data.shards.token_shards import open_shards as open_shards
    from fat5.data.shards.token_shards import read_manifest as read_manifest
    from fat5.data.shards.token_shards import verify as verify
    from fat5.data.text.corpus import sample_path as sample_path
    from fat5.data.tokenizer.loading import Tokenizer as Tokenizer
    from fat5.data.tokenizer.loading import TokenizerInfo as TokenizerInfo
    from fat5.data.tokenizer.loading import load_tokenizer as load_tokenizer

__getattr__, __dir__ = lazy(__name__, __file__)
