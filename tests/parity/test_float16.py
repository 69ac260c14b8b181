"""float16: T5's feed-forward leaves its range, so `wo` stays in float32 and hidden states are clamped.

The weights are scaled until it happens (66,246 has been seen in a published T5; the largest float16 is 65,504).
"""

import copy

import pytest
import torch
from generation import prompts

import fat5
from fat5.generate.decoding import generate
from fat5.model import FAT5ForConditionalGeneration
from stock import FAMILIES, difference, fat5_like, rows, t5_v1_0, t5_v1_1, umt5

LARGEST = torch.finfo(torch.float16).max
# float16 keeps three digits, of which the gradient of a softmax, a difference of like numbers, loses one or two.
GRADIENT_TOLERANCE = 0.25
FAMILY = pytest.mark.parametrize("family", [t5_v1_0, t5_v1_1, umt5], ids=["v1.0", "v1.1", "umT5"])


def provoking(family, part):
    """A stock model in float32 whose feed-forwards ("wo") or attentions ("o") write numbers beyond float16."""
    model = family().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part == "wo" and ".wo." in name:
                parameter *= 3e6 / parameter.abs().max() / 48
            # Behind the first feed-forward the hidden states are float32, and stock T5 clamps nothing any more.
            # One attention a stack: two such outputs of opposite signs would cancel to what rounding makes of them.
            if part == "o" and "block.0.layer.0." in name and (".o." in name or ".v." in name):
                parameter *= 300
    return model


def loaded(stock, cls, folder, dtype=torch.float16):
    stock.save_pretrained(folder)
    return cls.from_pretrained(folder, dtype=dtype).eval()


def largest_written(model, part, batch):
    """The largest number that a projection of this name writes."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: seen.append(out.abs().max().item()))
        for name, module in model.named_modules()
        if name.endswith(f".{part}")
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return max(seen)


@FAMILY
def test_the_feed_forward_leaves_float16_and_we_do_not(family, tmp_path):
    truth, batch = provoking(family, "wo"), rows()
    assert largest_written(truth, "wo", batch) > 2 * LARGEST
    want = truth.double()(**batch).logits
    truth.float()
    # All in float16, as a plain .half() makes it: infinite on the way, and wrong at the end.
    plain = copy.deepcopy(truth).half()
    assert largest_written(plain, "wo", batch) == float("inf")
    stock, ours = (loaded(truth, cls, tmp_path) for cls in (type(truth), FAT5ForConditionalGeneration))
    assert {p.dtype for name, p in ours.named_parameters() if ".wo." in name} == {torch.float32}
    got = {name: model(**batch).logits for name, model in (("stock", stock), ("ours", ours), ("plain", plain))}
    assert got["ours"].isfinite().all()
    errors = {name: difference(logits.double(), want) for name, logits in got.items()}
    # Twice the error of plain PyTorch in the same precision is the house's rule.
    assert errors["ours"] <= 2 * errors["stock"]
    assert not errors["plain"] <= 10 * errors["ours"]


@FAMILY
def test_attention_that_leaves_float16_is_clamped_as_in_stock(family, tmp_path):
    truth, batch = provoking(family, "o"), rows()
    assert largest_written(truth, "o", batch) > 2 * LARGEST
    stock, ours = (loaded(truth, cls, tmp_path) for cls in (type(truth), FAT5ForConditionalGeneration))
    want, got = stock(**batch), ours(**batch)
    assert got.logits.isfinite().all()
    assert got.loss.isfinite()
    assert largest_written(ours, "o", batch) == float("inf")
    assert difference(got.logits.float(), want.logits.float()) <= 0.02


@FAMILY
@pytest.mark.parametrize("part", ["wo", "o"])
def test_accelerated_stock_models_stay_finite(family, part, tmp_path):
    stock, batch = loaded(provoking(family, part), FAMILIES_BY_CLASS[family], tmp_path), rows()
    want = stock(**batch).logits.float()
    got = fat5.accelerate(stock)(**batch).logits.float()
    assert got.isfinite().all()
    assert difference(got, want) <= 0.02


@FAMILY
@pytest.mark.parametrize("part", ["wo", "o"])
def test_the_decoding_loop_stays_finite(family, part, tmp_path):
    stock = loaded(provoking(family, part), FAMILIES_BY_CLASS[family], tmp_path)
    ours = fat5_like(stock, dtype=torch.float16).eval()
    want = stock.generate(**prompts(), max_new_tokens=6, output_scores=True, return_dict_in_generate=True)
    for model in (stock, ours):
        assert same_but_for_ties(generate(model, **prompts(), max_new_tokens=6), want)
    assert same_but_for_ties(ours.generate(**prompts(), max_new_tokens=6), want)


def same_but_for_ties(got, want):
    """Whether rows of tokens are stock's, up to a step where stock's two best scores are within float16's rounding."""
    for row, (mine, stock) in enumerate(zip(got, want.sequences, strict=True)):
        length = min(len(mine), len(stock))
        differ = (mine[:length] != stock[:length]).nonzero()
        if len(differ):
            scores = want.scores[int(differ[0]) - 1][row].float()
            gap = scores[stock[differ[0]]] - scores[mine[differ[0]]]
            if gap > 0.01 * scores[scores.isfinite()].abs().max():
                return False
        elif len(mine) != len(stock):
            return False
    return True


@FAMILY
def test_training_under_float16_autocast(family):
    """Weights in float32, as in mixed-precision training: the projection computes in float32 all the same."""
    stock = provoking(family, "wo").train()
    ours, batch = fat5_like(stock), rows()
    want = stock(**batch)
    want.loss.backward()
    # As a gradient scaler does: without it small gradients vanish in float16, and where large ones overflow it halves.
    for scale in (2.0**14, 2.0**13, 2.0**12, 2.0**11):
        with torch.autocast("cpu", torch.float16):
            got = ours(**batch)
        assert got.loss.isfinite()
        assert difference(got.loss[None], want.loss[None]) <= 0.02
        ours.zero_grad()
        (scale * got.loss).backward()
        if all(parameter.grad.isfinite().all() for parameter in ours.parameters()):
            break
    mine = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        assert mine[name].grad.isfinite().all(), name
        assert difference(mine[name].grad / scale, parameter.grad) <= GRADIENT_TOLERANCE, name


def test_bfloat16_needs_neither(tmp_path):
    truth, batch = provoking(t5_v1_1, "wo"), rows()
    want = truth.double()(**batch).logits
    truth.float()
    ours = loaded(truth, FAT5ForConditionalGeneration, tmp_path, torch.bfloat16)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    stock = copy.deepcopy(truth).bfloat16()
    assert difference(ours(**batch).logits.double(), want) <= 2 * difference(stock(**batch).logits.double(), want)


FAMILIES_BY_CLASS = {family: type(family()) for family in FAMILIES.values()}
