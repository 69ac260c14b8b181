import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fat5.data import Denoiser, MixtureOfDenoisers, reconstruct
from fat5.data.examples import kernels
from fat5.errors import ConfigurationError, DataError, TokenizerError
from made_corpus import FIRST_TOKEN, made_info

INFO = made_info()

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# The default mixture as the design gives it: mu, r, max_spans, prefix, proportion.
FAT5_ROWS = [
    (3.0, 0.15, "max_token_length", "[R]", 0.165),
    (8.0, 0.15, "max_token_length", "[R]", 0.165),
    (4.0, 0.0, 1, "[S]", 0.34),
    (3.0, 0.5, "max_token_length", "[X]", 0.0825),
    (8.0, 0.15, "max_token_length", "[X]", 0.0825),
    (64.0, 0.15, "max_token_length", "[X]", 0.0825),
    (64.0, 0.5, "max_token_length", "[X]", 0.0825),
]


def spans_of(targets: np.ndarray, info=INFO) -> list[int]:
    """Lengths of the spans of a target sequence, by its sentinels."""
    places = [*np.flatnonzero(np.isin(targets, info.sentinel_ids)).tolist(), len(targets) - 1]
    return [end - start - 1 for start, end in pairwise(places)]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    assert kernels.philox(*counter, *key) == expected


@pytest.mark.parametrize(("total", "parts"), [(7, 3), (7, 4)], ids=["few cuts", "many cuts"])
def test_compositions_are_uniform(total, parts):
    out, marks = np.empty(parts, np.int64), np.zeros(total, np.uint8)
    counts: Counter[tuple[int, ...]] = Counter()
    draws = 30_000
    for piece in range(draws):
        kernels.compose(total, parts, out, marks, 1, (piece, 0, 0, 5, 0))
        counts[tuple(out.tolist())] += 1
    expected = {tuple(np.diff([0, *cuts, total]).tolist()) for cuts in combinations(range(1, total), parts - 1)}
    assert set(counts) == expected
    freedom = len(expected) - 1
    chi_square = sum((count - draws / len(expected)) ** 2 / (draws / len(expected)) for count in counts.values())
    assert chi_square < freedom + 3.1 * (2 * freedom) ** 0.5 + 4  # beyond p = 0.001
    assert not marks.any()


def test_default_mixture_is_exactly_the_seven_rows():
    mixture = MixtureOfDenoisers.named("fat5")
    rows = [tuple(row[key] for key in ("mu", "r", "max_spans", "prefix")) for row in mixture.rows()]
    assert rows == [row[:4] for row in FAT5_ROWS]
    assert mixture.proportions == pytest.approx([row[4] for row in FAT5_ROWS], abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(2, 600),
    mu=st.floats(1.0, 80.0),
    r=st.floats(0.001, 0.95),
    max_spans=st.one_of(st.none(), st.just("max_token_length"), st.integers(1, 20)),
    prefix=st.sampled_from(["[R]", "[S]", "[X]", None]),
    sentinels=st.sampled_from([1, 7, 100, 256]),
    seed=st.integers(0, 2**63 - 1),
    piece=st.integers(0, 2**50),
    anywhere=st.booleans(),
)
def test_inputs_and_targets_reconstruct_any_document(
    length, mu, r, max_spans, prefix, sentinels, seed, piece, anywhere
):
    info = made_info(sentinels)
    tokens = np.random.default_rng(seed).integers(FIRST_TOKEN, info.vocab_size, length)
    denoiser = Denoiser(mu, r, max_spans, prefix, anywhere)
    inputs, targets = denoiser(tokens, info, seed=seed, piece=piece)
    assert np.array_equal(reconstruct(inputs, targets, info), tokens)
    assert (inputs.size, targets.size) == denoiser.lengths(length, sentinels)
    spans = spans_of(targets, info)
    noise = sum(spans)
    assert noise == min(max(round(length * r), 1), length - 1)
    most = min(length - noise, sentinels, max_spans if isinstance(max_spans, int) else length)
    assert len(spans) == min(max(round(noise / mu), 1), most)
    assert min(spans) >= 1
    assert prefix is None or inputs[0] == info.mode_ids[prefix]
    if not anywhere:
        assert inputs[int(prefix is not None)] == tokens[0]  # starts with text that is kept
        assert inputs[-2] == info.sentinel_ids[len(spans) - 1]  # and ends with a span


def test_spans_that_may_lie_anywhere_lie_everywhere_alike():
    # Two tokens of six in one span: five places; two spans of one token each of five: all pairs that do not touch.
    for length, r, mu, places in ((6, 1 / 3, 2.0, 5), (5, 0.4, 1.0, 6)):
        denoiser, draws = Denoiser(mu, r, anywhere=True), 6_000
        found = Counter(tuple(denoiser(range(500, 500 + length), INFO, piece=n)[0].tolist()) for n in range(draws))
        assert len(found) == places
        assert all(abs(count - draws / places) < 4 * (draws / places) ** 0.5 for count in found.values())


def test_fat5_anywhere_is_fat5_with_its_spans_anywhere():
    usual, other = (MixtureOfDenoisers.named(name) for name in ("fat5", "fat5-anywhere"))
    assert usual.proportions == other.proportions
    assert [replace(one, anywhere=False) for one in other.denoisers] == list(usual.denoisers)
    assert [one.anywhere for one in other.denoisers] == [not one.sequential for one in usual.denoisers]
    assert not any("anywhere" in row for row in usual.rows())  # as in the checkpoints of older runs


@settings(max_examples=100, deadline=None)
@given(length=st.integers(2, 3000), mu=st.floats(1.01, 50.0))
def test_the_sequential_denoiser_keeps_a_prefix_and_predicts_the_rest(length, mu):
    tokens = np.random.default_rng(length).integers(FIRST_TOKEN, INFO.vocab_size, length)
    inputs, targets = Denoiser(mu, 0.0, 1, "[S]")(tokens, INFO, seed=3)
    kept = min(max(round(length / mu), 1), length - 1)
    first, eos = INFO.sentinel_ids[0], INFO.eos_id
    assert inputs.tolist() == [INFO.mode_ids["[S]"], *tokens[:kept], first, eos]
    assert targets.tolist() == [first, *tokens[kept:], eos]


def test_ul2_sequential_is_one_span_of_a_quarter_at_the_end():
    denoiser = MixtureOfDenoisers.named("ul2").denoisers[2]
    tokens = np.arange(FIRST_TOKEN, FIRST_TOKEN + 400)
    inputs, targets = denoiser(tokens, INFO, seed=1, piece=8)
    assert targets[1:-1].tolist() == tokens[300:].tolist()
    assert inputs[1:-2].tolist() == tokens[:300].tolist()


@pytest.mark.parametrize(
    "denoiser", MixtureOfDenoisers.named("fat5").denoisers[:2] + MixtureOfDenoisers.named("fat5").denoisers[3:]
)
def test_corruption_rate_and_span_length_are_those_asked_for(denoiser):
    lengths = np.arange(400, 1025, 25)
    noise = spans = tokens = 0
    for piece, length in enumerate(lengths):
        _, targets = denoiser(np.full(length, FIRST_TOKEN), INFO, piece=piece)
        noise += sum(spans_of(targets))
        spans += len(spans_of(targets))
        tokens += length
    assert noise / tokens == pytest.approx(denoiser.r, rel=0.01)
    assert noise / spans == pytest.approx(
        denoiser.mu, rel=0.12 if denoiser.mu == 64 else 0.02
    )  # 64 divides few lengths


def test_noise_is_a_pure_function_of_seed_epoch_and_piece():
    tokens = np.arange(FIRST_TOKEN, FIRST_TOKEN + 300)
    denoiser = Denoiser(3.0, 0.15, None, "[R]")
    once, again = denoiser(tokens, INFO, seed=1, epoch=2, piece=3), denoiser(tokens, INFO, seed=1, epoch=2, piece=3)
    assert np.array_equal(once[0], again[0])
    for other in ({"seed": 2}, {"epoch": 3}, {"piece": 4}, {"piece": 3 + 2**32}, {"seed": 1 + 2**32}):
        changed = denoiser(tokens, INFO, **({"seed": 1, "epoch": 2, "piece": 3} | other))
        assert not np.array_equal(once[0], changed[0]), other


def test_fewer_sentinels_make_fewer_longer_spans():
    tokens = np.arange(FIRST_TOKEN, FIRST_TOKEN + 600)
    few = made_info(sentinels=20)
    _, targets = Denoiser(3.0, 0.5, None, "[X]")(tokens, few)
    assert len(spans_of(targets, few)) == 20
    assert sum(spans_of(targets, few)) == 300


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.5, 0.15), "mu .* from 1 to"),
        ((float("nan"), 0.15), "mu"),
        (("3", 0.15), "mu"),
        ((3.0, 1.0), r"r \(corruption rate\)"),
        ((3.0, -0.1), r"r \(corruption rate\)"),
        ((3.0, True), r"r \(corruption rate\)"),
        ((3.0, 0.15, 0), "max_spans"),
        ((3.0, 0.15, "many"), "max_spans"),
        ((3.0, 0.15, None, ""), "prefix"),
        ((3.0, 0.15, None, 3), "prefix"),
        ((4.0, 0.0), "sequential"),
        ((1.0, 0.0, 1), "sequential"),
    ],
)
def test_a_denoiser_that_cannot_work_is_refused(values, message):
    with pytest.raises(ConfigurationError, match=message):
        Denoiser(*values)


def test_a_sequential_denoiser_lies_nowhere_else():
    with pytest.raises(ConfigurationError, match="anywhere"):
        Denoiser(4.0, 0.0, 1, "[S]", anywhere=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("nonesuch", "fat5, fat5-anywhere, ul2, t5, prefix-lm"),
        ([], "1 to 127"),
        ([{"mu": 3.0}], r"mixture\[0\]: r is missing"),
        ([{"mu": 3.0, "r": 0.1, "rate": 1}], "unknown key 'rate'"),
        ([{"mu": 3.0, "r": 0.1, "proportion": 0}], r"mixture\[0\]\.proportion"),
        ([{"mu": 3.0, "r": 0.1, "proportion": float("inf")}], "proportion"),
        (["R"], r"mixture\[0\]"),
        (7, "a name or a list"),
    ],
)
def test_a_mixture_that_cannot_work_is_refused(rows, message):
    with pytest.raises(ConfigurationError, match=message):
        MixtureOfDenoisers.of(rows)


def test_a_mixture_survives_the_round_trip_through_rows():
    for name in ("fat5", "fat5-anywhere", "ul2", "t5", "prefix-lm"):
        mixture = MixtureOfDenoisers.named(name)
        assert MixtureOfDenoisers.of(mixture.rows()) == mixture
        assert len(set(mixture.names())) == len(mixture)


def test_missing_mode_tokens_and_sentinels_are_named():
    with pytest.raises(TokenizerError, match=r"no mode token '\[Q\]'"):
        Denoiser(3.0, 0.15, None, "[Q]")([500, 501, 502], INFO)
    with pytest.raises(TokenizerError, match="extra_id_0"):
        Denoiser(3.0, 0.15)([500, 501, 502], made_info(sentinels=0))


def test_a_document_of_one_token_is_refused():
    with pytest.raises(DataError, match="too short"):
        Denoiser(3.0, 0.15)([500], INFO)


def test_reconstruct_refuses_halves_that_do_not_belong_together():
    denoiser = Denoiser(3.0, 0.5, None, "[X]")
    tokens = np.arange(FIRST_TOKEN, FIRST_TOKEN + 60)
    inputs, targets = denoiser(tokens, INFO)
    with pytest.raises(DataError):
        reconstruct(inputs[:-1], targets, INFO)
    with pytest.raises(DataError):
        reconstruct(inputs[inputs != INFO.sentinel_ids[2]], targets, INFO)


def test_kernels_work_where_no_cache_folder_can_be_written():
    program = (
        "from pathlib import Path; import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "from fat5.data.examples import kernels\n"
        "print(kernels.philox(0, 0, 0, 0, 0, 0)[0])\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": "/dev/null/none"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 0x6627E8D5
