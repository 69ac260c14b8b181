"""Our decoding loop writes the tokens of stock `generate`: each mode, each family, each position encoding."""

from functools import partial

import pytest
import torch
from generation import LOOP, prompts, seeded, until_end
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5EncoderModel,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from fat5.generate.decoding import Decoder, generate
from fat5.model import POSITION_ENCODINGS, FAT5Config, FAT5ForConditionalGeneration
from stock import SIZES, fat5_like, t5_v1_0, t5_v1_1

# Past WINDOW keys, so that the window grows, and past the reach of the bias.
LENGTH = 130
LONG = ({}, {"num_beams": 3})  # what chooses among logits knows nothing of lengths
MODES = pytest.mark.parametrize("how", list(LOOP.values()), ids=list(LOOP))


def mt5() -> MT5ForConditionalGeneration:
    return MT5ForConditionalGeneration(MT5Config(**SIZES, feed_forward_proj="gated-gelu"))


def umt5() -> UMT5ForConditionalGeneration:
    return UMT5ForConditionalGeneration(UMT5Config(**SIZES, feed_forward_proj="gated-gelu"))


def compare(stock, model, how, side="right", length=LENGTH):
    batch = prompts(side)
    want = seeded(stock.generate, **batch, max_new_tokens=length, **how)
    got = seeded(generate, model, **batch, max_new_tokens=length, **how)
    assert got.shape == want.shape
    assert until_end(got, 1) == until_end(want, 1)


@MODES
@pytest.mark.parametrize("family", [t5_v1_1, t5_v1_0, mt5, umt5], ids=["v1.1", "v1.0", "mt5", "umt5"])
def test_stock_models(family, how):
    stock = family().eval()
    compare(stock, stock, how, length=LENGTH if family is t5_v1_1 and how in LONG else 24)


@MODES
@pytest.mark.parametrize("side", ["right", "left"])
def test_our_model(how, side):
    stock = t5_v1_1().eval()
    compare(stock, fat5_like(stock).eval(), how, side, LENGTH if side == "right" and how in LONG else 24)


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_every_position_encoding(encoding, how):
    model = FAT5ForConditionalGeneration(FAT5Config(**SIZES, position_encoding=encoding)).eval()
    compare(model, model, how, length=24)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
@pytest.mark.parametrize("ends", [1, 2], ids=["one-end", "two-ends"])
def test_rows_end_at_different_times(how, ends):
    stock, batch = t5_v1_1().eval(), prompts()
    free = stock.generate(**batch, max_new_tokens=12, eos_token_id=98, repetition_penalty=3.0, **how)
    lengths = set()
    for place in range(2, 12):
        # Ends that some row does write, on its way.
        stops = free[place % 3, place - ends + 1 : place + 1].tolist()
        want, got = (
            write(**batch, max_new_tokens=12, repetition_penalty=3.0, eos_token_id=stops, **how)
            for write in (stock.generate, partial(generate, stock))
        )
        assert got.shape == want.shape
        written = until_end(got, stops)
        assert written == until_end(want, stops)
        assert not any(any(row[len(until) :]) for row, until in zip(got.tolist(), written))
        lengths |= set(map(len, written))
    assert len(lengths) > 2


def test_a_generator_is_the_seed():
    model, batch = t5_v1_1().eval(), prompts()
    torch.manual_seed(7)
    want = model.generate(**batch, max_new_tokens=20, do_sample=True)
    before = torch.get_rng_state()
    got = generate(model, **batch, max_new_tokens=20, do_sample=True, generator=torch.Generator().manual_seed(7))
    assert torch.equal(got, want)
    assert torch.equal(torch.get_rng_state(), before)


def test_layers_that_are_no_plain_linear_are_called():
    model, batch = t5_v1_1().eval(), prompts()
    plain = generate(model, **batch, max_new_tokens=20)
    for name in ("q", "o"):
        layer = getattr(model.decoder.block[0].layer[0].SelfAttention, name)
        layer.register_forward_hook(lambda module, inputs, output: output * 3.0)
    want = model.generate(**batch, max_new_tokens=20)
    got = generate(model, **batch, max_new_tokens=20)
    assert torch.equal(got, want)
    assert not torch.equal(got, plain)


def test_half_precision_follows_stock():
    # A few steps, since bfloat16 soon ties.
    model, batch = t5_v1_1(num_layers=3, num_decoder_layers=3).eval().bfloat16(), prompts()
    want = model.generate(**batch, max_new_tokens=4)
    assert torch.equal(generate(model, **batch, max_new_tokens=4), want)


def test_what_cannot_be_is_refused():
    model = t5_v1_1().eval()
    with pytest.raises(TypeError, match="T5EncoderModel"):
        Decoder(T5EncoderModel(model.config))
    decoder = Decoder(model)
    with pytest.raises(ValueError, match="num_beams"):
        decoder.generate(**prompts(), max_new_tokens=3, num_beams=2, do_sample=True)
    with pytest.raises(ValueError, match="max_new_tokens"):
        decoder.generate(**prompts(), max_new_tokens=0)
    with pytest.raises(ValueError, match="cuda_graph"):
        decoder.generate(**prompts(), max_new_tokens=3, cuda_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_likeliest_tokens_are_those_of_the_model(dtype):
    model, batch = fat5_like(t5_v1_1()).eval(), prompts()
    with torch.autocast("cpu", dtype):
        written = generate(model, **batch, max_new_tokens=40)
        assert generate(model, **batch, max_new_tokens=4, num_beams=3).shape[1] <= 5
        with torch.no_grad():
            logits = model(**batch, decoder_input_ids=written[:, :-1]).logits.float()
    behind_an_end = (written[:, 1:] == model.config.pad_token_id).cumsum(1) > 0
    chosen = logits.gather(2, written[:, 1:, None])[..., 0]
    short = (logits.amax(-1) - chosen).masked_fill(behind_an_end, 0.0)
    assert short.max() <= 0.02 * logits.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a GPU")
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_cuda_graphs_replay_the_same_tokens(how):
    model = t5_v1_1().eval().cuda()
    batch = {key: value.cuda() for key, value in prompts().items()}
    want = generate(model, **batch, max_new_tokens=LENGTH, **how)
    assert torch.equal(generate(model, **batch, max_new_tokens=LENGTH, cuda_graph=True, **how), want)
