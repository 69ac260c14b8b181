"""FAT5 against stock transformers T5, beyond the checks of every family: odd masks, generation."""

import pytest
import torch

import fat5
from stock import (
    EVERY_FAMILY,
    GRADIENT_TOLERANCE,
    LOGITS_TOLERANCE,
    difference,
    fat5_like,
    gradient_difference,
    packed,
    rows,
    t5_v1_1,
)


@EVERY_FAMILY
def test_packed_losses_by_token(family):
    stock, batch = family(), rows()
    ours = fat5_like(stock)
    want, got = stock(**batch), ours(**packed(batch), per_token=True)
    counted = batch["labels"] != -100
    nll = torch.nn.functional.cross_entropy(want.logits[counted], batch["labels"][counted], reduction="none")
    torch.testing.assert_close(got.token_loss[: counted.sum()], nll, rtol=1e-4, atol=1e-4)
    assert not got.token_loss[counted.sum() :].any()
    assert torch.equal(got.token_correct[: counted.sum()], want.logits[counted].argmax(-1) == batch["labels"][counted])


def test_mask_with_holes():
    stock, batch = t5_v1_1(), rows()
    batch["attention_mask"][0, 20:40] = batch["attention_mask"][1, 3] = 0
    want, got = stock(**batch), fat5_like(stock)(**batch)
    assert difference(got.logits, want.logits) <= LOGITS_TOLERANCE


def test_num_items_in_batch_divides_the_sum():
    ours, batch = fat5_like(t5_v1_1()), packed(rows())
    count = (batch["labels"] != -100).sum()
    torch.testing.assert_close(ours(**batch, num_items_in_batch=7).loss * 7, ours(**batch).loss * count)


def test_unknown_keywords_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'atention_mask'"):
        fat5_like(t5_v1_1())(input_ids=torch.ones(1, 3, dtype=torch.long), atention_mask=None)


def test_packed_training_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match=r"^output_attentions: packed training"):
        fat5_like(t5_v1_1())(**packed(rows()), output_attentions=True)


def test_attentions_of_generation():
    stock = t5_v1_1().eval()
    stock.set_attn_implementation("eager")
    batch = {key: value for key, value in rows().items() if key != "labels"}
    how = {"max_new_tokens": 4, "output_attentions": True, "return_dict_in_generate": True}
    want, got = (model.generate(**batch, **how) for model in (stock, fat5_like(stock).eval()))
    for name in ("decoder_attentions", "cross_attentions"):
        for got_step, want_step in zip(getattr(got, name), getattr(want, name), strict=True):
            for one, other in zip(got_step, want_step, strict=True):
                assert difference(one, other) <= LOGITS_TOLERANCE


@EVERY_FAMILY
@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_reentrant_checkpoints(family, layout):
    """Each block runs a backward of its own there, and all read one bias and one memory."""
    stock, batch = family(), rows()
    ours = fat5_like(stock)
    ours.gradient_checkpointing_enable({"use_reentrant": True})
    stock(**batch).loss.backward()
    ours(**(packed(batch) if layout == "packed" else batch)).loss.backward()
    assert gradient_difference(stock, ours) <= GRADIENT_TOLERANCE


def test_each_block_is_checkpointed_by_itself():
    """As activation_checkpointing_enable(every_n_layers=2) asks."""
    ours, runs = fat5_like(t5_v1_1(num_layers=3)), []
    ours.gradient_checkpointing_enable()
    ours.encoder.block[1].gradient_checkpointing = False
    for place, block in enumerate(ours.encoder.block):
        block.layer[0].register_forward_hook(lambda *_, place=place: runs.append(place))
    ours(**rows()).loss.backward()
    assert sorted(runs) == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_mask_of_another_shape_is_refused(name, cached):
    """Read as it lies, a shorter one would hide other tokens."""
    ours = fat5_like(t5_v1_1()).eval()
    given = {"input_ids": rows()["input_ids"], "decoder_input_ids": torch.randint(2, 99, (3, 150)), "use_cache": cached}
    mask = torch.ones(3, 150)
    for wrong in (mask[:, :100], mask[:1], mask[:, None], mask[:, None, None].expand(-1, 1, 150, -1)):
        if name == "decoder_attention_mask" and (cached or wrong.dim() == 4):
            continue  # it covers the tokens in the cache too, or has an entry for each query and key
        with pytest.raises(ValueError, match=r"attention_mask.*: expected shape \(3, 150\)"):
            ours(**given, **{name: wrong})
    with pytest.raises(ValueError, match=r"^attention_mask: expected shape \(3, 150\)"):
        fat5.FAT5EncoderModel(ours.config)(given["input_ids"], attention_mask=mask[:, :100])


@EVERY_FAMILY
@pytest.mark.parametrize("cached", [False, True])
def test_the_decoder_by_itself(family, cached):
    """get_decoder(), called as the stock one is."""
    stock, batch = family().eval(), rows()
    ours, tokens = fat5_like(stock).eval(), torch.randint(2, 99, (3, 9))
    found = []
    for model in (stock, ours):
        memory = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        how = {"encoder_hidden_states": memory, "encoder_attention_mask": batch["attention_mask"], "use_cache": cached}
        out = model.get_decoder()(input_ids=tokens, **how)
        assert (out.past_key_values is not None) == cached
        found.append(out.last_hidden_state)
        if cached:
            more = model.get_decoder()(input_ids=tokens[:, :2], past_key_values=out.past_key_values, **how)
            found[-1] = torch.cat([found[-1], more[0]], dim=1)
    assert difference(found[1], found[0]) <= LOGITS_TOLERANCE
