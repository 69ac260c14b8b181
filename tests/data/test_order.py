import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fat5.data import MixtureOfDenoisers, PieceStream, WeightedShards
from fat5.data.examples import kernels
from fat5.data.examples.order import blend
from fat5.errors import ConfigurationError, DataError, TokenizerError
from made_corpus import made_documents, made_info, write_corpus

INFO = made_info()
FAT5 = MixtureOfDenoisers.named("fat5")
LOCAL = (1 << kernels.PIECE_BITS) - 1


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 3000), words=st.tuples(*[st.integers(0, 2**32 - 1)] * 4))
def test_permutation_is_a_bijection(size, words):
    assert sorted(kernels.permute(index, size, *words) for index in range(size)) == list(range(size))


def test_permutation_is_well_mixed():
    size = 1000
    orders = np.array(
        [[kernels.permute(i, size, *kernels.philox(key, 0, 0, 0, 1, 2)) for i in range(size)] for key in range(40)]
    )
    assert np.abs(orders.mean(axis=0) - (size - 1) / 2).max() < 5 * size / np.sqrt(12 * 40)
    neighbours = np.mean(np.abs(np.diff(orders)) == 1)
    assert neighbours < 0.004  # 2/size in expectation


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=150).filter(lambda all: max(all) >= 2),
    max_tokens=st.integers(8, 40),
    shards=st.integers(1, 4),
)
def test_pieces_are_the_documents_cut_and_nothing_is_lost(tmp_path_factory, lengths, max_tokens, shards):
    documents = made_documents(lengths)
    stream = PieceStream(
        [write_corpus(tmp_path_factory.mktemp("c"), documents, shards)], FAT5, INFO, max_tokens, seed=1
    )
    pieces = [stream.tokens(piece) for piece in range(stream.num_pieces[0])]
    kept = [document for document in documents if len(document) >= 2]
    assert stream.short_documents == [len(documents) - len(kept)]
    assert stream.short_tokens == [sum(length for length in lengths if length < 2)]
    assert stream.cut_documents == [sum(length > max_tokens for length in lengths)]
    assert np.array_equal(np.concatenate(pieces), np.concatenate(kept))
    assert all(2 <= len(piece) <= max_tokens for piece in pieces)


def test_each_pass_holds_every_piece_once_in_an_order_of_its_own(tmp_path):
    lengths = np.random.default_rng(0).integers(0, 300, 700)
    stream = PieceStream([write_corpus(tmp_path, made_documents(lengths), 3)], FAT5, INFO, 128, seed=5)
    size = stream.num_pieces[0]
    passes = stream.resolve(np.arange(3 * size))
    orders = passes.piece.reshape(3, size)
    for epoch, order in enumerate(orders):
        assert sorted(order) == list(range(size))
        assert (passes.epoch.reshape(3, size)[epoch] == epoch).all()
    assert not np.array_equal(orders[0], orders[1])
    other = PieceStream(stream.sources, FAT5, INFO, 128, seed=6).resolve(np.arange(size))
    assert not np.array_equal(orders[0], other.piece)


def test_a_position_resolves_the_same_alone_as_in_company(tmp_path):
    stream = PieceStream([write_corpus(tmp_path, made_documents([50] * 90), 2)], FAT5, INFO, 64, seed=5)
    together = stream.resolve(np.arange(200))
    for position in (0, 17, 89, 90, 199):
        alone = stream.resolve(np.array([position]))
        assert all(column[0] == whole[position] for column, whole in zip(alone, together))


def test_denoisers_are_drawn_in_proportion(tmp_path):
    stream = PieceStream([write_corpus(tmp_path, made_documents([20] * 500))], FAT5, INFO, 64, seed=5)
    drawn = np.bincount(stream.resolve(np.arange(100_000)).denoiser, minlength=7) / 100_000
    deviation = np.sqrt(np.array(FAT5.proportions) * (1 - np.array(FAT5.proportions)) / 100_000)
    assert (np.abs(drawn - FAT5.proportions) < 4 * deviation).all()


def test_a_draw_is_what_the_public_denoiser_makes(tmp_path):
    stream = PieceStream([write_corpus(tmp_path, made_documents([90] * 60))], FAT5, INFO, 128, seed=9)
    examples = stream.resolve(np.arange(120))
    inputs, targets, *cu = stream.write(examples)
    for n in range(120):
        denoiser = FAT5.denoisers[examples.denoiser[n]]
        tokens = stream.tokens(int(examples.piece[n]))
        wanted = denoiser(tokens, INFO, seed=9, epoch=int(examples.epoch[n]), piece=int(examples.piece[n]))
        assert np.array_equal(inputs[cu[0][n] : cu[0][n + 1]], wanted[0])
        assert np.array_equal(targets[cu[1][n] : cu[1][n + 1]], wanted[1])


def test_sources_are_blended_by_tokens_and_each_keeps_its_own_passes(tmp_path):
    rng = np.random.default_rng(0)
    small = write_corpus(tmp_path / "small", made_documents(rng.integers(20, 40, 50)))
    large = write_corpus(tmp_path / "large", made_documents(rng.integers(100, 200, 4000)))
    stream = PieceStream([WeightedShards(small, 1.0), WeightedShards(large, 3.0)], FAT5, INFO, 256, seed=2)
    drawn = stream.resolve(np.arange(3000))
    source = drawn.piece >> kernels.PIECE_BITS
    tokens = [drawn.length[source == s].sum() for s in (0, 1)]
    assert tokens[0] / sum(tokens) == pytest.approx(0.25, abs=0.01)
    for s, shards in enumerate((small, large)):
        local, size = drawn.piece[source == s] & LOCAL, shards.num_documents
        for start in range(0, local.size - size, size):
            assert sorted(local[start : start + size]) == list(range(size))
    assert stream.passes(3000) == pytest.approx([(source == 0).sum() / 50, (source == 1).sum() / 4000], rel=0.01)


@settings(max_examples=50, deadline=None)
@given(shares=st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=6))
def test_blend_counts_are_exact_and_spread_evenly(shares):
    shares = np.array(shares) / np.sum(shares)
    source, rank, counts = blend(shares)
    assert np.array_equal(np.bincount(source, minlength=len(shares)), counts)
    assert (np.abs(counts / counts.sum() - shares) <= len(shares) / counts.sum()).all()
    for s in range(len(shares)):
        assert np.array_equal(rank[source == s], np.arange(counts[s]))
        gaps = np.diff(np.flatnonzero(source == s))
        assert not gaps.size or gaps.max() <= source.size / counts[s] + 2 * len(shares) + 1


def test_wide_token_files_are_read_like_narrow_ones(tmp_path):
    documents = made_documents([40] * 30)
    wide_info = made_info(vocab_size=70_000 // 128 * 128 + 128)
    narrow = PieceStream([write_corpus(tmp_path / "2", documents)], FAT5, INFO, 64, seed=1)
    wide = PieceStream([write_corpus(tmp_path / "4", documents, info=wide_info)], FAT5, wide_info, 64, seed=1)
    assert wide.tables.token_bytes.tolist() == [4]
    flat = []
    for stream in (narrow, wide):
        flat.append(np.concatenate(stream.write(stream.resolve(np.arange(30)))))
    assert np.array_equal(*flat)


def test_what_cannot_be_streamed_is_named(tmp_path):
    shards = write_corpus(tmp_path / "good", made_documents([9, 9]))
    with pytest.raises(TokenizerError, match="another tokenizer"):
        PieceStream([shards], FAT5, made_info().__class__(**(made_info().__dict__ | {"sha256": "b" * 64})), 64, seed=1)
    with pytest.raises(DataError, match="no document of at least 2 tokens"):
        PieceStream([write_corpus(tmp_path / "short", made_documents([1, 0, 1]))], FAT5, INFO, 64, seed=1)
    for arguments, message in (
        ({"max_tokens": 4}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"sources": []}, "no data source"),
        ({"sources": [WeightedShards(shards, 0.0)]}, "weight"),
        ({"sources": [WeightedShards(shards, float("nan"))]}, "weight"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            PieceStream(
                **({"sources": [shards], "mixture": FAT5, "info": INFO, "max_tokens": 64, "seed": 1} | arguments)
            )


def test_short_documents_and_too_few_sentinels_are_reported(tmp_path):
    few = made_info(sentinels=20)
    shards = write_corpus(tmp_path, made_documents([1, 50, 0, 60]))
    notes = PieceStream([shards], FAT5, few, 256, seed=1).notes()
    assert "2 of 4 documents" in notes[0]
    limited = next(note for note in notes if "mu=3 r=0.5" in note)
    assert "20 sentinels" in limited
    assert "of 123 tokens and more" in limited  # 62 noise tokens would make 21 spans
    assert not any("mu=64" in note for note in notes)
    assert PieceStream([write_corpus(tmp_path / "2", made_documents([50]))], FAT5, INFO, 256, seed=1).notes() == []
