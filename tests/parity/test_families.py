"""Every family against its stock class: each check of checks.py, and state dicts of equal names and shapes."""

import pytest
from checks import CHECKS, ENCODER_CHECKS

from stock import ENCODERS, EVERY_FAMILY, GRADIENT_TOLERANCE, LOGITS_TOLERANCE, fat5_like


@EVERY_FAMILY
def test_state_dict_is_stock_s(family):
    stock = family()
    want, got = ({name: x.shape for name, x in model.state_dict().items()} for model in (stock, fat5_like(stock)))
    assert got == want


@EVERY_FAMILY
@pytest.mark.parametrize("check", CHECKS)
def test_check(family, check):
    assert CHECKS[check](family()) <= (GRADIENT_TOLERANCE if "gradients" in check else LOGITS_TOLERANCE)


@pytest.mark.parametrize("family", ENCODERS.values(), ids=ENCODERS.keys())
@pytest.mark.parametrize("check", ENCODER_CHECKS)
def test_encoder(family, check):
    assert ENCODER_CHECKS[check](family()) <= (GRADIENT_TOLERANCE if "gradients" in check else LOGITS_TOLERANCE)
