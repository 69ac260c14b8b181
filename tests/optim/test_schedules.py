"""Schedules at their corners: first and last update, the peak, and steps that follow one another."""

from itertools import pairwise

import pytest

from fat5.errors import ConfigurationError
from fat5.optim import ScheduleConfig, learning_rate

NAMES = ["cosine", "linear", "inverse_sqrt", "constant", "wsd"]


def rates(total=100, **settings):
    config = ScheduleConfig(**settings)
    config.validate(total)
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_linear_and_peaks_at_one(name):
    values = rates(name=name, warmup_steps=10)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(values) == 1.0
    assert all(later <= earlier for earlier, later in pairwise(values[9:]))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_last_update_takes_the_final_factor(name, final):
    values = rates(name=name, warmup_steps=5, final_factor=final)
    assert values[-1] == pytest.approx(final, abs=1e-12)
    assert values[-2] > final
    config = ScheduleConfig(name=name, warmup_steps=5, final_factor=final)
    assert learning_rate(config, 1000, 100) == pytest.approx(final, abs=1e-12)


def test_cosine_is_halfway_in_the_middle():
    assert rates(total=101, name="cosine", warmup_steps=0)[50 - 1] == pytest.approx(0.5, abs=0.02)


def test_inverse_sqrt_halves_when_steps_quadruple():
    values = rates(total=1000, name="inverse_sqrt", warmup_steps=100)
    assert values[99] == 1.0
    assert values[399] == pytest.approx(0.5)


def test_wsd_is_flat_until_its_decay():
    values = rates(name="wsd", warmup_steps=10, decay_steps=20, final_factor=0.0)
    assert values[10:79] == [1.0] * 69
    assert values[80:] == pytest.approx([1 - (step + 1) / 20 for step in range(20)])


def test_constant_without_warm_up():
    assert set(rates(name="constant", warmup_steps=0)) == {1.0}


@pytest.mark.parametrize(("total", "warmup"), [(4, 0), (750, 50), (1_000_000, 10_000)])
def test_a_warm_up_that_is_not_given_fits_the_run(total, warmup):
    assert ScheduleConfig().resolved(total).warmup_steps == warmup
    assert learning_rate(ScheduleConfig(), 0, 750) == 1 / 50


def test_whole_run_may_be_warm_up():
    for name in NAMES:
        assert rates(total=10, name=name, warmup_steps=10)[-1] == 1.0


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"warmup_steps": 200}, "warmup_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"final_factor": 1.5}, "final_factor"),
        ({"name": "cosine", "decay_steps": 5}, "decay_steps"),
        ({"name": "wsd", "decay_steps": 500}, "decay_steps"),
    ],
)
def test_impossible_schedules_are_refused(settings, key):
    with pytest.raises(ConfigurationError, match=key):
        ScheduleConfig(**settings).validate(100)
