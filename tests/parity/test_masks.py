"""A mask hides keys and nothing else: every position is computed as in the stock class, and a query that sees no key
attends to all keys alike. Encoders leave padding out where a decoder follows, or where they are told to.
"""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    T5Config,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
)

import fat5
from fat5.errors import ConfigurationError
from fat5.generate.decoding import generate
from pairwise import pairwise
from stock import (
    FAMILIES,
    GRADIENT_TOLERANCE,
    LOGITS_TOLERANCE,
    SIZES,
    difference,
    encoder,
    fat5_like,
    gradient_difference,
    rows,
    t5_v1_1,
    umt5_encoder,
)


def with_interface(stock: Any) -> Any:
    model = copy.deepcopy(stock)
    model.set_attn_implementation("fat5")
    return model


SERVED = {
    "FAT5": fat5_like,
    "accelerate": lambda stock: fat5.accelerate(copy.deepcopy(stock)),
    "attn_implementation": with_interface,
}
EVERY_WAY = pytest.mark.parametrize("serve", SERVED.values(), ids=SERVED.keys())
ENCODERS = {"T5": encoder, "umT5": umt5_encoder}
MASKS = ["start", "left", "right", "holes", "all", "text"]


def masked(kind: str) -> dict[str, Any]:
    """A batch whose labels count everywhere, under a mask of one kind."""
    batch = rows()
    batch["labels"] = torch.randint(2, 99, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    if kind == "start":
        mask[:, 0] = 0  # decoder_input_ids.ne(pad), where the start token is the pad token
    elif kind == "text":
        batch["attention_mask"][1] = 0  # a text without a token
    else:
        mask[1, {"left": slice(0, 4), "right": slice(5, 12), "holes": slice(3, 12, 4), "all": slice(0, 12)}[kind]] = 0
    return batch | {"decoder_attention_mask": mask}


@pairwise(3, family=FAMILIES, serve=SERVED, kind=MASKS)
def test_every_position_is_as_stock(family, serve, kind):
    stock, batch = family(), masked(kind)
    ours = serve(stock)
    if kind == "text" and serve is fat5_like:
        # Of a text without a token torch's fused kernel on the CPU, which stock cross-attention takes, makes gradients
        # that are too large by the text's length; the plain formula's are right.
        stock.set_attn_implementation("eager")
    want, got = stock(**batch), ours(**batch)
    assert difference(got.logits, want.logits) <= LOGITS_TOLERANCE
    assert difference(got.loss[None], want.loss[None]) <= LOGITS_TOLERANCE
    want.loss.backward()
    got.loss.backward()
    if kind == "text" and serve is fat5_like:
        # Eager passes the gradient of hidden scores on to the table, sdpa and FAT5 do not.
        for model in (stock, ours):
            for name, parameter in model.encoder.named_parameters():
                if "relative_attention_bias" in name:
                    parameter.grad = torch.ones_like(parameter)
    assert gradient_difference(stock, ours) <= GRADIENT_TOLERANCE


@pairwise(2, serve=SERVED, kind=MASKS, implementation=["eager", "sdpa"])
def test_a_cache_changes_nothing(serve, kind, implementation):
    stock, batch = t5_v1_1().eval(), masked(kind)
    stock.set_attn_implementation(implementation)
    inputs = stock._shift_right(batch.pop("labels"))
    mask, ours = batch.pop("decoder_attention_mask"), serve(stock)
    want = stock(**batch, decoder_input_ids=inputs, decoder_attention_mask=mask).logits
    for how in ({"use_cache": False}, {"use_cache": True}, {"use_cache": True, "output_hidden_states": True}):
        got = ours(**batch, decoder_input_ids=inputs, decoder_attention_mask=mask, **how).logits
        assert difference(got, want) <= LOGITS_TOLERANCE, how
    # In two parts, each beside stock: a first query without a key attends to what was there then.
    logits: list[list[torch.Tensor]] = []
    for model in (stock, ours):
        first = model(**batch, decoder_input_ids=inputs[:, :6], decoder_attention_mask=mask[:, :6], use_cache=True)
        past = first.past_key_values
        logits.append([first.logits])
        for place in range(6, 9):
            part = {"decoder_input_ids": inputs[:, place : place + 1], "decoder_attention_mask": mask[:, : place + 1]}
            step = model(**batch, **part, past_key_values=past)
            past = step.past_key_values
            logits[-1].append(step.logits)
    for got, want in zip(*reversed(logits), strict=True):
        assert difference(got, want) <= LOGITS_TOLERANCE


def test_the_first_target_is_learned_behind_a_hidden_start_token():
    """As in many scripts: mask = decoder_input_ids.ne(pad), which hides the start token."""
    ours, batch = fat5_like(t5_v1_1()), masked("start")
    out = ours(**batch)
    assert (out.logits[:, 0].abs().amax(dim=-1) > 0).all()
    torch.nn.functional.cross_entropy(out.logits[:, 0], batch["labels"][:, 0]).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in ours.parameters())


HEADS = {
    "sequence": (
        T5ForSequenceClassification, fat5.FAT5ForSequenceClassification, {"labels": torch.tensor([0, 1, 1])}, "logits",
    ),
    "tokens": (
        T5ForTokenClassification, fat5.FAT5ForTokenClassification,
        {"labels": torch.arange(450).view(3, 150) % 2}, "logits",
    ),
    "answers": (
        T5ForQuestionAnswering, fat5.FAT5ForQuestionAnswering,
        dict.fromkeys(["start_positions", "end_positions"], torch.tensor([0, 2, 149])), "start_logits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
@EVERY_WAY
def test_heads_at_hidden_positions(head, serve):
    """EOS masked, labels at padding, an answer that ends in padding."""
    stock_class, our_class, labels, name = HEADS[head]
    stock = stock_class(T5Config(**SIZES, classifier_dropout=0.0)).train()
    batch = {key: value for key, value in rows().items() if key != "labels"}
    batch["input_ids"] = torch.randint(2, 99, (3, 150))
    batch["input_ids"][:, 100] = 1  # EOS, hidden in two of the texts
    if head != "tokens":
        batch["decoder_attention_mask"] = batch["attention_mask"]
    ours = fat5_like(stock, our_class) if serve is fat5_like else serve(stock)
    want, got = stock(**batch, **labels), ours(**batch, **labels)
    assert difference(got[name], want[name]) <= LOGITS_TOLERANCE
    assert difference(got.loss[None], want.loss[None]) <= LOGITS_TOLERANCE
    want.loss.backward()
    got.loss.backward()
    if head == "answers":  # a shift of all logits changes no softmax: this gradient is rounding alone
        stock.qa_outputs.bias.grad = ours.qa_outputs.bias.grad = torch.ones(2)
    assert gradient_difference(stock, ours) <= GRADIENT_TOLERANCE


def serve_encoder(stock: Any, serve: Any, **options: Any) -> Any:
    if serve is fat5_like:
        return fat5_like(stock, fat5.FAT5EncoderModel, **options)
    return fat5.accelerate(copy.deepcopy(stock), **options)


def source(kind: str) -> dict[str, torch.Tensor]:
    batch = {key: value for key, value in rows("left" if kind == "left" else "right").items() if key != "labels"}
    if kind == "holes":
        batch["attention_mask"][0, 20:40] = 0
    elif kind == "all":
        batch["attention_mask"][1] = 0
    return batch


@pairwise(2, made=ENCODERS, serve=SERVED, kind=["right", "left", "holes", "all"])
def test_an_encoder_alone_computes_padding(made, serve, kind):
    """Image pipelines read these rows: Chroma one, IF all."""
    stock, batch = made(), source(kind)
    ours = with_interface(stock) if serve is with_interface else serve_encoder(stock, serve)
    want, got = stock(**batch, output_hidden_states=True), ours(**batch, output_hidden_states=True)
    assert difference(got.last_hidden_state, want.last_hidden_state) <= LOGITS_TOLERANCE
    for one, other in zip(got.hidden_states, want.hidden_states, strict=True):
        assert difference(one, other) <= LOGITS_TOLERANCE
    assert torch.equal(ours(**batch).last_hidden_state, got.last_hidden_state)
    weight = torch.randn_like(want.last_hidden_state)
    for model in (stock, ours):
        (model(**batch).last_hidden_state * weight).sum().backward()
    assert gradient_difference(stock, ours) <= GRADIENT_TOLERANCE


@pairwise(2, made=ENCODERS, serve={"FAT5": fat5_like, "accelerate": None}, kind=["right", "left", "holes"])
def test_an_encoder_leaves_padding_out_where_it_may(made, serve, kind):
    stock, batch = made().eval(), source(kind)
    ours, kept = serve_encoder(stock, serve, compute_padding=False), batch["attention_mask"].bool()
    want = stock(**batch, output_hidden_states=True).hidden_states
    got = ours(**batch, output_hidden_states=True)
    assert torch.equal(ours(**batch).last_hidden_state, got.last_hidden_state)
    for one, other in zip(got.hidden_states, want, strict=True):
        assert difference(one[kept], other[kept]) <= LOGITS_TOLERANCE
        assert not one[~kept].any()


@pytest.mark.parametrize("serve", [fat5_like, SERVED["accelerate"]], ids=["FAT5", "accelerate"])
@pytest.mark.parametrize("asked", [False, True])
def test_an_encoder_that_a_decoder_follows_leaves_padding_out(serve, asked):
    """Whether hidden states are asked for or not."""
    stock, batch = t5_v1_1().eval(), rows()
    want = stock(**batch).encoder_last_hidden_state
    got = serve(stock)(**batch, output_hidden_states=asked).encoder_last_hidden_state
    kept = batch["attention_mask"].bool()
    assert difference(got[kept], want[kept]) <= LOGITS_TOLERANCE
    assert not got[~kept].any()


@pytest.mark.parametrize("way", ["FAT5", "accelerate"])
def test_an_encoder_that_a_decoder_follows_computes_padding_when_told(way):
    stock, batch = t5_v1_1().eval(), rows()
    ours = (
        fat5_like(stock, compute_padding=True)
        if way == "FAT5"
        else fat5.accelerate(copy.deepcopy(stock), compute_padding=True)
    )
    want, got = stock(**batch), ours(**batch)
    assert difference(got.encoder_last_hidden_state, want.encoder_last_hidden_state) <= LOGITS_TOLERANCE
    assert difference(got.logits, want.logits) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("positions", ["absolute", "fire"])
def test_padding_on_the_left_moves_no_token(positions):
    """Positions that count from the first token: padding is left out, and cannot be asked for."""
    options: dict[str, Any] = SIZES | {"position_encoding": positions}
    ours = fat5.FAT5EncoderModel(fat5.FAT5Config(**options)).eval()
    ids, mask = torch.randint(2, 99, (2, 9)), torch.ones(2, 9)
    mask[1, :4] = 0
    alone = ours(ids[1:, 4:]).last_hidden_state[0]
    assert difference(ours(ids, mask).last_hidden_state[1, 4:], alone) <= LOGITS_TOLERANCE
    with pytest.raises(ConfigurationError, match=r"compute_padding: .*count from a text's first token"):
        fat5.FAT5Config(**options, compute_padding=True)


def test_compute_padding_is_a_choice():
    with pytest.raises(ConfigurationError, match="compute_padding: expected true, false or null, got 'no'"):
        fat5.FAT5Config(compute_padding="no")


def test_accelerate_forgets_the_choice_when_undone():
    model = encoder()
    fat5.accelerate(model, compute_padding=False)
    assert vars(model.encoder)["computes_padding"] is False
    fat5.accelerate(model, undo=True)
    assert "computes_padding" not in vars(model.encoder)


@pytest.mark.parametrize("ours", [False, True], ids=["stock", "FAT5"])
def test_our_loop_decodes_a_text_without_a_token(ours):
    stock = t5_v1_1().eval()
    batch = {key: value for key, value in masked("text").items() if key in ("input_ids", "attention_mask")}
    want = stock.generate(**batch, max_new_tokens=12)
    model = fat5_like(stock).eval() if ours else stock
    got = generate(model, **batch, max_new_tokens=12)
    assert torch.equal(got, want)
    assert torch.equal(model.generate(**batch, max_new_tokens=12), want)
