"""Stock models of every family with random weights, small, and batches for them."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
    UMT5ForConditionalGeneration,
)

from fat5.model import FAT5ForConditionalGeneration

SIZES: dict[str, Any] = dict(
    vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
    decoder_start_token_id=0,
    dropout_rate=0.0,
)  # fmt: skip
# The design's bound for float32: 1e-5 of the largest logit. A gradient passes through more sums.
LOGITS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-5


def t5_v1_1(**options: Any) -> T5ForConditionalGeneration:
    """Gated GELU and an output projection of its own."""
    config = T5Config(**(SIZES | options), feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return _untied(T5ForConditionalGeneration(config))


def t5_v1_0(**options: Any) -> T5ForConditionalGeneration:
    """ReLU, tied, scaled output."""
    return T5ForConditionalGeneration(T5Config(**(SIZES | options))).train()


def mt5(**options: Any) -> MT5ForConditionalGeneration:
    """v1.1 under its own model_type."""
    return _untied(MT5ForConditionalGeneration(MT5Config(**(SIZES | options), tie_word_embeddings=False)))


def umt5(**options: Any) -> UMT5ForConditionalGeneration:
    """A bias table in every layer."""
    return _untied(UMT5ForConditionalGeneration(UMT5Config(**(SIZES | options), tie_word_embeddings=False)))


def byt5(**options: Any) -> T5ForConditionalGeneration:
    """Deep encoder, shallow decoder, bytes."""
    return t5_v1_1(**({"vocab_size": 384, "num_layers": 6, "num_decoder_layers": 2} | options))


def encoder(**options: Any) -> T5EncoderModel:
    """T5's encoder alone, gated."""
    return T5EncoderModel(T5Config(**(SIZES | options), feed_forward_proj="gated-gelu")).train()


def umt5_encoder(**options: Any) -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**(SIZES | options))).train()


def _untied(model: Any) -> Any:
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    return model.train()


FAMILIES = {"v1.0": t5_v1_0, "v1.1": t5_v1_1, "mT5": mt5, "umT5": umt5, "ByT5": byt5}
ENCODERS = {"T5 encoder": encoder, "umT5 encoder": umt5_encoder}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def fat5_like(stock: Any, cls: Any = FAT5ForConditionalGeneration, **options: Any) -> Any:
    """FAT5 from the folder that the stock model saves."""
    with TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        return cls.from_pretrained(Path(folder), **options).train(stock.training)


def rows(side: str = "right") -> dict[str, Tensor]:
    """Three examples of unequal length, padded on one side; labels padded with -100."""
    ids, mask = torch.randint(2, 99, (3, 150)), torch.ones(3, 150, dtype=torch.long)
    for row, length in enumerate((150, 90, 7)):
        mask[row, length:] = 0
    if side == "left":
        mask = mask.flip(1)
    labels = torch.randint(2, 99, (3, 12))
    labels[1, 5:] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def packed(batch: dict[str, Tensor], tail: int = 3) -> dict[str, Any]:
    """The same examples as documents one after another, with empty documents and free rows behind them."""
    sources = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    targets = [labels[labels != -100] for labels in batch["labels"]]
    return {
        "input_ids": torch.cat([*sources, torch.zeros(tail, dtype=torch.long)]),
        "cu_seqlens": starts(sources),
        "max_seqlen": 160,
        "labels": torch.cat([*targets, torch.full((tail,), -100)]),
        "decoder_cu_seqlens": starts(targets),
        "decoder_max_seqlen": 16,
    }


def starts(documents: list[Tensor]) -> Tensor:
    """cu_seqlens of documents and of two empty ones behind them."""
    ends = torch.tensor([0, *map(len, documents)]).cumsum(0)
    return torch.cat([ends, ends[-1:], ends[-1:]]).int()


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest entry of what is wanted."""
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max())


def gradient_difference(stock: torch.nn.Module, ours: torch.nn.Module) -> float:
    """The largest difference of any parameter's gradient, each relative to its largest entry."""
    mine = dict(ours.named_parameters())
    assert {name for name, _ in stock.named_parameters()} == mine.keys()
    return max(difference(mine[name].grad, parameter.grad) for name, parameter in stock.named_parameters())  # type: ignore[arg-type]
