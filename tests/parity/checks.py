"""What is compared between a stock model and FAT5 from its folder: each check returns the largest relative difference.

The tests assert that each is within tolerance; benchmarks/parity.py writes them down.
"""

from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fat5.model import FAT5EncoderModel
from stock import difference, fat5_like, gradient_difference, packed, rows

SOURCE = ("input_ids", "attention_mask")


def logits(stock: Any, side: str = "right") -> float:
    """Padded rows, with labels of -100 among them."""
    batch = rows(side)
    return difference(fat5_like(stock)(**batch).logits, stock(**batch).logits)


def loss(stock: Any, packs: bool = False) -> float:
    """Of documents packed too, against the same rows padded."""
    batch = rows()
    return difference(fat5_like(stock)(**(packed(batch) if packs else batch)).loss[None], stock(**batch).loss[None])


def gradients(stock: Any, side: str = "right", packs: bool = False, checkpointed: bool = False) -> float:
    """Of every parameter, from padded rows or packed documents."""
    batch, ours = rows(side), fat5_like(stock)
    if checkpointed:
        ours.gradient_checkpointing_enable()
        assert ours.is_gradient_checkpointing
    stock(**batch).loss.backward()
    ours(**(packed(batch) if packs else batch)).loss.backward()
    return gradient_difference(stock, ours)


def packed_alone(stock: Any) -> float:
    """Each packed document's losses, against those of the stock model on the document alone."""
    batch = rows()
    got = fat5_like(stock)(**packed(batch), per_token=True).token_loss
    alone = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"]):
        target = labels[labels != -100]
        out = stock(input_ids=ids[mask.bool()][None], labels=target[None]).logits[0]
        alone.append(torch.nn.functional.cross_entropy(out.float(), target, reduction="none"))
    want = torch.cat(alone)
    return difference(got[: len(want)], want)


def inputs_embeds(stock: Any) -> float:
    """Embeddings in place of ids, on both sides."""
    batch, inputs = rows(), torch.randint(2, 99, (3, 9))
    given = {
        "inputs_embeds": stock.shared(batch["input_ids"]), "attention_mask": batch["attention_mask"],
        "decoder_inputs_embeds": stock.shared(inputs), "use_cache": False,
    }  # fmt: skip
    return difference(fat5_like(stock)(**given).logits, stock(**given).logits)


def decoder_mask(stock: Any) -> float:
    """decoder_attention_mask that hides the first tokens of a row."""
    given = _with_decoder_mask()
    return difference(fat5_like(stock)(**given).logits, stock(**given).logits)


def hidden_states(stock: Any) -> float:
    """output_hidden_states, every layer of both stacks, at the tokens."""
    batch = rows()
    kept = batch["attention_mask"].bool()
    want, got = stock(**batch, output_hidden_states=True), fat5_like(stock)(**batch, output_hidden_states=True)
    pairs = [(g[kept], w[kept]) for g, w in _pairs(got.encoder_hidden_states, want.encoder_hidden_states)]
    pairs += _pairs(got.decoder_hidden_states, want.decoder_hidden_states)
    return max(difference(g, w) for g, w in pairs)


def attentions(stock: Any) -> float:
    """output_attentions: self-attention of both stacks and cross-attention, and the logits beside them."""
    given = _with_decoder_mask()
    stock.set_attn_implementation("eager")
    want, got = stock(**given, output_attentions=True), fat5_like(stock)(**given, output_attentions=True)
    worst = difference(got.logits, want.logits)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for g, w in _pairs(getattr(got, name), getattr(want, name)):
            worst = max(worst, difference(g, w))
    return worst


def way_back(stock: Any) -> float:
    """The logits of the stock class from the folder that FAT5 saves."""
    batch = rows()
    return difference(_read_back(stock, fat5_like(stock))(**batch).logits, stock(**batch).logits)


CHECKS: dict[str, Callable[[Any], float]] = {
    "logits": logits,
    "logits, padded left": partial(logits, side="left"),
    "loss": loss,
    "gradients": gradients,
    "gradients, padded left": partial(gradients, side="left"),
    "gradients, checkpointed": partial(gradients, checkpointed=True),
    "packed: loss": partial(loss, packs=True),
    "packed: each document alone": packed_alone,
    "packed: gradients": partial(gradients, packs=True),
    "packed: gradients, checkpointed": partial(gradients, packs=True, checkpointed=True),
    "inputs_embeds": inputs_embeds,
    "decoder_attention_mask": decoder_mask,
    "output_hidden_states": hidden_states,
    "output_attentions": attentions,
    "saved by FAT5, read by stock": way_back,
}


# Of the encoder alone.


def encoder_states(stock: Any, side: str = "right") -> float:
    """Padding too, as everywhere but in `encoder_packed`, which has none."""
    batch, _ = _source(side)
    return difference(_encoder(stock)(**batch)[0], stock(**batch)[0])


def encoder_gradients(stock: Any) -> float:
    batch, kept = _source()
    weight, ours = torch.randn(*kept.shape, stock.config.d_model), _encoder(stock)
    for model in (stock, ours):
        (model(**batch)[0] * weight).sum().backward()
    return gradient_difference(stock, ours)


def encoder_packed(stock: Any) -> float:
    """Documents packed, against the same rows padded."""
    batch, kept = _source()
    documents = packed(batch | {"labels": torch.zeros(3, 1, dtype=torch.long)})
    given = {key: documents[key] for key in ("input_ids", "cu_seqlens", "max_seqlen")}
    return difference(_encoder(stock)(**given)[0][: kept.sum()], stock(**batch)[0][kept])


def encoder_inputs_embeds(stock: Any) -> float:
    batch, _ = _source()
    batch["inputs_embeds"] = stock.shared(batch.pop("input_ids"))
    return difference(_encoder(stock)(**batch)[0], stock(**batch)[0])


def encoder_hidden_states(stock: Any) -> float:
    batch, _ = _source()
    want, got = (model(**batch, output_hidden_states=True).hidden_states for model in (stock, _encoder(stock)))
    return max(difference(g, w) for g, w in _pairs(got, want))


def encoder_attentions(stock: Any) -> float:
    batch, _ = _source()
    stock.set_attn_implementation("eager")
    want, got = (model(**batch, output_attentions=True).attentions for model in (stock, _encoder(stock)))
    return max(difference(g, w) for g, w in _pairs(got, want))


def encoder_way_back(stock: Any) -> float:
    batch, kept = _source()
    back = _read_back(stock, _encoder(stock)).train(stock.training)
    return difference(back(**batch)[0][kept], stock(**batch)[0][kept])


# Named as those of a whole model, so that a table can show them side by side.
ENCODER_CHECKS: dict[str, Callable[[Any], float]] = {
    "logits": encoder_states,
    "logits, padded left": partial(encoder_states, side="left"),
    "gradients": encoder_gradients,
    "packed: each document alone": encoder_packed,
    "inputs_embeds": encoder_inputs_embeds,
    "output_hidden_states": encoder_hidden_states,
    "output_attentions": encoder_attentions,
    "saved by FAT5, read by stock": encoder_way_back,
}


def _encoder(stock: Any) -> Any:
    return fat5_like(stock, FAT5EncoderModel)


def _source(side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    batch = {key: value for key, value in rows(side).items() if key in SOURCE}
    return batch, batch["attention_mask"].bool()


def _read_back(stock: Any, ours: Any) -> Any:
    """The stock class from the folder that FAT5 saves."""
    with TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        back, info = type(stock).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return back


def _with_decoder_mask() -> dict[str, Any]:
    batch, mask = rows(), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    given = {key: batch[key] for key in SOURCE}
    given |= {"decoder_input_ids": torch.randint(2, 99, (3, 9)), "decoder_attention_mask": mask, "use_cache": False}
    return given


def _pairs(got: Any, want: Any) -> list[tuple[Tensor, Tensor]]:
    assert len(got) == len(want) > 0
    return list(zip(got, want))
