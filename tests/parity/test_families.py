"""Every family against its stock class: each check of checks.py, and state dicts of equal names and shapes."""

import pytest
from checks import CHECKS
from stock import EVERY_FAMILY, GRADIENT_TOLERANCE, LOGITS_TOLERANCE, fat5_like


@EVERY_FAMILY
def test_state_dict_is_stock_s(family):
    stock = family()
    want, got = ({name: x.shape for name, x in model.state_dict().items()} for model in (stock, fat5_like(stock)))
    assert got == want


@EVERY_FAMILY
@pytest.mark.parametrize("check", CHECKS)
def test_check(family, check):
    assert CHECKS[check](family()) <= (GRADIENT_TOLERANCE if "gradients" in check else LOGITS_TOLERANCE)
