import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fat5.data import MixtureOfDenoisers, pack, suggest_budgets
from fat5.data.examples.packing import fill
from fat5.errors import ConfigurationError, DataError


def mixture_lengths(lengths: np.ndarray, name: str = "fat5", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    mixture = MixtureOfDenoisers.named(name)
    noise, spans = mixture.tables(int(lengths.max()), 256)
    drawn = np.random.default_rng(seed).choice(len(mixture), lengths.size, p=mixture.proportions)
    noise, spans = noise[drawn, lengths], spans[drawn, lengths]
    return lengths - noise + spans + 2, noise + spans + 1


@settings(max_examples=120, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 50)), max_size=200),
    window=st.integers(1, 64),
    most=st.one_of(st.none(), st.integers(1, 10)),
)
def test_every_example_is_packed_once_within_both_budgets(sizes, window, most):
    encoder, decoder = (np.array(side, np.int64) for side in zip(*sizes)) if sizes else (np.zeros(0), np.zeros(0))
    packs = pack(encoder, decoder, 60, 50, window=window, max_examples=most)
    assert sorted(index for members in packs for index in members) == list(range(len(sizes)))
    for members in packs:
        assert encoder[members].sum() <= 60
        assert decoder[members].sum() <= 50
        assert 1 <= len(members) <= (most or len(sizes))


@pytest.mark.parametrize("name", ["fat5", "ul2"])
@pytest.mark.parametrize("case", ["uniform 50-1024", "all 1024", "paragraphs"])
def test_fill_is_99_and_97_percent_at_the_suggested_budgets(name, case):
    rng = np.random.default_rng(7)
    lengths = {
        "uniform 50-1024": rng.integers(50, 1025, 12_000),
        "all 1024": np.full(12_000, 1024),
        "paragraphs": np.clip(rng.exponential(53, 40_000).astype(int) + 8, 2, 1024),
    }[case]
    encoder, decoder = mixture_lengths(lengths, name)
    budgets = suggest_budgets(encoder.mean(), decoder.mean(), 16384)
    packs = pack(encoder, decoder, *budgets)
    assert sum(map(len, packs)) == lengths.size
    last = 1 + -(-1024 // min(map(len, packs[:-8])))  # the window empties: no more choice, as at no time in training
    tight, loose = sorted(
        (fill(packs[:-last], encoder, budgets[0]), fill(packs[:-last], decoder, budgets[1])), reverse=True
    )
    assert tight >= 0.99
    assert loose >= 0.97


def test_mismatched_budgets_fill_the_tighter_side_and_hoard_nothing():
    lengths = np.random.default_rng(1).integers(50, 1025, 12_000)
    encoder, decoder = mixture_lengths(lengths)
    packs = pack(encoder, decoder, 16384, 8192)[:-60]
    assert fill(packs, decoder, 8192) >= 0.98
    oldest_first = [min(members) for members in packs]
    assert oldest_first == sorted(oldest_first)
    assert max(max(members) - min(members) for members in packs) < 2 * 1024 + 100  # nobody waits for long


def test_no_example_waits_for_ever():
    encoder = np.array([100] + [10] * 5000)
    packs = pack(encoder, np.ones_like(encoder), 100, 100, window=32)
    assert packs[0] == [0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([5, 90], [5, 5], 80, 80), DataError, "example 1 has 90 encoder tokens, a pack holds 80.*encoder_tokens"),
        (([5, 5], [5, 90], 80, 80), DataError, "example 1 has 90 decoder tokens"),
        (([5], [5, 6], 80, 80), DataError, "shape"),
        (([-1], [5], 80, 80), DataError, "negative"),
        (([5], [5], 0, 80), ConfigurationError, "encoder_tokens"),
        (([5], [5], 80, 80, 0), ConfigurationError, "window"),
        (([5], [5], 80, 80, 9, 0), ConfigurationError, "max_examples"),
    ],
)
def test_what_cannot_be_packed_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        pack(*arguments)
