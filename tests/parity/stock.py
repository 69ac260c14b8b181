"""Stock T5 models with random weights, small, and batches for them."""

import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from fat5.model import FAT5Config, FAT5ForConditionalGeneration

SIZES = dict(
    vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=3, num_heads=4,
    decoder_start_token_id=0,
    dropout_rate=0.0,
)  # fmt: skip
# d_model 32 with unit embeddings gives logits of about 20: 1e-5 of that.
LOGITS_TOLERANCE = 2e-4
GRADIENT_TOLERANCE = 2e-5


def t5_v1_1() -> T5ForConditionalGeneration:
    """Gated GELU and an output projection of its own."""
    model = T5ForConditionalGeneration(T5Config(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(SIZES["vocab_size"], SIZES["d_model"]))
    return model.train()


def t5_v1_0() -> T5ForConditionalGeneration:
    """ReLU, tied, scaled output."""
    return T5ForConditionalGeneration(T5Config(**SIZES)).train()


def fat5_like(stock: T5ForConditionalGeneration, **options) -> FAT5ForConditionalGeneration:
    """FAT5 with the stock model's weights."""
    tied = stock.lm_head.weight is stock.shared.weight
    model = FAT5ForConditionalGeneration(
        FAT5Config(**SIZES, feed_forward_proj=stock.config.feed_forward_proj, tie_word_embeddings=tied, **options)
    )
    model.load_state_dict(stock.state_dict())
    return model.train()


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


def packed(batch: dict[str, Tensor], tail: int = 3) -> dict[str, object]:
    """The same examples as documents one after another, with empty documents and free rows behind them."""
    sources = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    targets = [labels[labels != -100] for labels in batch["labels"]]

    def starts(documents: list[Tensor]) -> Tensor:
        ends = torch.tensor([0, *map(len, documents)]).cumsum(0)
        return torch.cat([ends, ends[-1:], ends[-1:]]).int()

    return {
        "input_ids": torch.cat([*sources, torch.zeros(tail, dtype=torch.long)]),
        "cu_seqlens": starts(sources),
        "max_seqlen": 160,
        "labels": torch.cat([*targets, torch.full((tail,), -100)]),
        "decoder_cu_seqlens": starts(targets),
        "decoder_max_seqlen": 16,
    }


def assert_gradients_agree(stock: T5ForConditionalGeneration, ours: FAT5ForConditionalGeneration) -> None:
    """Every parameter's gradient, relative to its largest entry."""
    mine = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        error = (mine[name].grad - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < GRADIENT_TOLERANCE, f"{name}: {error:.3g}"
