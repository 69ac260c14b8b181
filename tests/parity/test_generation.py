"""Stock `generate` on our classes, in all its modes, and our own loop write the tokens of the stock class."""

import pytest
import torch
from generation import MODES, agreement, prompts

from stock import FAMILIES, fat5_like, t5_v1_1

# Every mode where most is new: v1.1 and a bias table in every layer; the others where families differ.
BASIC = ["greedy", "beams", "sampling", "static cache", "greedy, padded left"]
CASES = [
    pytest.param(family, mode, id=f"{family}-{mode}", marks=pytest.mark.slow if family == "umT5" and n % 2 else ())
    for family in FAMILIES
    for n, mode in enumerate(MODES if family in ("v1.1", "umT5") else BASIC)
]


@pytest.mark.parametrize(("family", "mode"), CASES)
def test_the_same_tokens(family, mode):
    equal, tokens = agreement(FAMILIES[family](), mode)
    assert equal == tokens > 12


def test_the_modes_are_not_one():
    """A comparison of things that cannot differ would prove nothing."""
    stock = t5_v1_1().eval()
    written = [
        stock.generate(**prompts(), max_new_tokens=8, **how).tolist()
        for how in ({}, {"num_beams": 3}, {"bad_words_ids": [[3]]}, {"min_new_tokens": 8, "do_sample": True})
    ]
    other = fat5_like(t5_v1_1()).eval().generate(**prompts(), max_new_tokens=8).tolist()
    assert len({str(tokens) for tokens in [*written, other]}) > 2


def test_scores_states_and_weights_of_beams():
    stock = t5_v1_1().eval()
    stock.set_attn_implementation("eager")
    how = {"num_beams": 3, "max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    how |= {"output_hidden_states": True, "output_attentions": True}
    want, got = (model.generate(**prompts(), **how) for model in (stock, fat5_like(stock).eval()))
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, rtol=1e-5, atol=1e-5)
    for name in ("decoder_hidden_states", "decoder_attentions", "cross_attentions"):
        for mine, theirs in zip(getattr(got, name), getattr(want, name), strict=True):
            for one, other in zip(mine, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
