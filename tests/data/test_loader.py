import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from fat5.data import (
    BatchConfig,
    MixtureOfDenoisers,
    PackedBatch,
    PackedLoader,
    PieceStream,
    WeightedShards,
    open_shards,
    reconstruct,
    unpack,
    validation_batches,
)
from fat5.data.examples.workers import PREFETCH
from fat5.errors import ConfigurationError, DataError
from made_corpus import made_documents, made_info, write_corpus

INFO = made_info()
FAT5 = MixtureOfDenoisers.named("fat5")
CONFIG = {"max_tokens": 128, "encoder_tokens": 512, "decoder_tokens": 384, "packs_per_step": 4, "window": 128}
LENGTHS = np.random.default_rng(3).integers(1, 400, 300)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), made_documents(LENGTHS), shards=3)


def loader(
    shards, *, seed=1, num_workers=0, rank=0, world_size=1, context=None, timeout=60.0, **changes
) -> PackedLoader:
    config = BatchConfig(**(CONFIG | changes))
    options = {"rank": rank, "world_size": world_size, "num_workers": num_workers, "timeout": timeout}
    return PackedLoader(stream_of(shards, config, seed), config, multiprocessing_context=context, **options)


def stream_of(shards, config, seed=1) -> PieceStream:
    return PieceStream([shards], FAT5, INFO, config.max_tokens, seed)


def take(iterable, count: int) -> list[PackedBatch]:
    iterator = iter(iterable)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def exhaust(iterator) -> None:
    for _ in range(100):
        next(iterator)


def examples(batches) -> list[tuple]:
    """What a model would see, in order: piece, denoiser, inputs, targets."""
    return [
        (piece, denoiser, tuple(inputs.tolist()), tuple(targets.tolist()))
        for batch in batches
        for piece, denoiser, (inputs, targets) in zip(batch.piece.tolist(), batch.denoiser.tolist(), unpack(batch))
    ]


def same(left: PackedBatch, right: PackedBatch) -> bool:
    return all(
        torch.equal(value, right.model_inputs()[key])
        for key, value in left.model_inputs().items()
        if torch.is_tensor(value)
    )


def test_a_batch_has_the_promised_shapes_and_fillers(shards):
    batches = take(loader(shards, packs_per_micro_batch=2), 4)
    most = 2 * (512 // 16)
    for batch in batches:
        used, decoder_used, count = int(batch.cu_seqlens[-1]), int(batch.decoder_cu_seqlens[-1]), batch.num_examples
        assert (batch.input_ids.shape, batch.input_ids.dtype) == ((1024,), torch.int64)
        assert (batch.labels.shape, batch.labels.dtype) == ((768,), torch.int64)
        for cu_seqlens, end in ((batch.cu_seqlens, used), (batch.decoder_cu_seqlens, decoder_used)):
            assert (cu_seqlens.shape, cu_seqlens.dtype, int(cu_seqlens[0])) == ((most + 1,), torch.int32, 0)
            assert (cu_seqlens.diff()[:count] > 0).all()
            assert (cu_seqlens[count:] == end).all()
        assert (batch.input_ids[used:] == INFO.pad_id).all()
        assert (batch.labels[decoder_used:] == -100).all()
        assert (batch.labels[:decoder_used] >= 0).all()
        assert int(batch.cu_seqlens.diff().max()) <= batch.max_seqlen
        assert int(batch.decoder_cu_seqlens.diff().max()) <= batch.decoder_max_seqlen
        assert (batch.piece[:count] >= 0).all()
        assert (batch.piece[count:] == -1).all()
        assert (batch.denoiser[count:] == -1).all()
        assert batch.denoiser.dtype == torch.int8
        assert batch.num_items == decoder_used
    assert len({(batch.max_seqlen, batch.decoder_max_seqlen) for batch in batches}) == 1


def test_every_document_is_reconstructed_from_the_packed_batches(shards):
    """Zero tokens dropped: two whole passes over the corpus, put together again from what the model would see."""
    stream = loader(shards)
    pieces: dict[int, list[np.ndarray]] = {}
    tokens = 0
    for batch in stream:
        tokens += batch.tokens
        for piece, (inputs, targets) in zip(batch.piece.tolist(), unpack(batch)):
            pieces.setdefault(piece, []).append(reconstruct(inputs, targets, INFO))
        if min(stream.stream.passes(stream.state_dict()["cursor"])) > 2.5:
            break
    # Position 2·N is far behind by now, so each piece has been seen in both passes.
    assert sorted(pieces) == list(range(stream.stream.num_pieces[0]))
    assert all(len(copies) >= 2 and all(np.array_equal(copies[0], c) for c in copies) for copies in pieces.values())
    rebuilt = np.concatenate([pieces[piece][0] for piece in sorted(pieces)])
    documents = [document for document in shards if len(document) >= 2]
    assert np.array_equal(rebuilt, np.concatenate(documents))
    assert tokens == sum(len(copies) * len(copies[0]) for copies in pieces.values())


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_change_nothing(shards, num_workers):
    alone, helped = take(loader(shards), 11), take(loader(shards, num_workers=num_workers), 11)
    assert all(same(left, right) for left, right in zip(alone, helped))


def test_spawned_workers_change_nothing(shards):
    alone, spawned = take(loader(shards), 3), take(loader(shards, num_workers=1, context="spawn"), 3)
    assert all(same(left, right) for left, right in zip(alone, spawned))


@pytest.mark.parametrize(("world_size", "packs"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_world_size_and_micro_batch_change_nothing(shards, world_size, packs):
    reference = examples(take(loader(shards), 12))  # three steps of four packs
    per_rank = [
        take(loader(shards, rank=rank, world_size=world_size, packs_per_micro_batch=packs), 12 // world_size // packs)
        for rank in range(world_size)
    ]
    per_step = 4 // world_size // packs
    in_order = [
        batch
        for step in range(3)
        for rank in range(world_size)
        for batch in per_rank[rank][step * per_step : (step + 1) * per_step]
    ]
    assert examples(in_order) == reference


def test_restoring_anywhere_equals_going_on(shards):
    rng = np.random.default_rng(0)
    reference = take(loader(shards), 60)
    for stop in sorted(rng.integers(0, 50, 6).tolist()):
        first = loader(shards, num_workers=int(rng.integers(0, 2)))
        take(first, stop) if stop else None
        state = json.loads(json.dumps(first.state_dict()))
        again = loader(shards, num_workers=int(rng.integers(0, 3)))
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert all(same(left, right) for left, right in zip(take(again, 8), reference[stop:]))


def test_state_is_that_of_batches_handed_out_not_of_those_prepared(shards):
    ahead, exact = loader(shards, num_workers=2), loader(shards)
    for batches in (iter(ahead), iter(exact)):
        for _ in range(5):
            next(batches)
    assert PREFETCH > 1
    assert ahead.state_dict() == exact.state_dict()
    assert ahead.state_dict()["step"] == 1


def test_state_is_small_and_restoring_reads_no_tokens(shards):
    stream = loader(shards)
    take(stream, 40)
    assert len(json.dumps(stream.state_dict())) < 2000
    config = BatchConfig(**CONFIG)
    fresh = PackedLoader(stream_of(open_shards(shards.folder), config), config)
    fresh.load_state_dict(stream.state_dict())
    assert fresh.stream.tables.tokens_address.tolist() == [0, 0, 0]


def test_a_run_goes_on_with_another_world_size_and_micro_batch(shards):
    reference = examples(take(loader(shards), 16))
    first = loader(shards, rank=1, world_size=2)
    take(first, 4)  # two steps
    ranks = [loader(shards, rank=rank, world_size=4) for rank in range(4)]
    for rank in ranks:
        rank.load_state_dict(first.state_dict())
    batches = [take(rank, 2) for rank in ranks]
    in_order = [batches[rank][step] for step in range(2) for rank in range(4)]
    seen = examples(in_order)
    assert seen == reference[len(reference) - len(seen) :]


def test_changing_one_document_changes_no_other_example(tmp_path, shards):
    documents = made_documents(LENGTHS)
    target = int(np.argmax(LENGTHS > 200))
    changed = documents[target].copy()
    changed[:] = changed[::-1]
    documents[target] = changed
    other = write_corpus(tmp_path, documents, shards=3)
    before, after = examples(take(loader(shards), 80)), examples(take(loader(other), 80))
    differing = {left[0] for left, right in zip(before, after) if left != right}
    assert len(before) == len(after)
    start = sum(-(-int(length) // 128) for length in LENGTHS[:target] if length >= 2)
    assert differing
    assert differing <= set(range(start, start + -(-int(LENGTHS[target]) // 128)))


def test_a_pack_of_tiny_documents_closes_at_the_static_bound(tmp_path):
    shards = write_corpus(tmp_path, made_documents([2] * 400))
    batches = take(loader(shards, max_examples=20), 10)
    assert all(batch.num_examples == 20 for batch in batches)


def test_sources_blend_in_the_loader(tmp_path, shards):
    other = write_corpus(tmp_path, made_documents([60] * 40))
    sources = [WeightedShards(shards, 2.0), WeightedShards(other, 1.0)]
    both = PieceStream(sources, FAT5, INFO, CONFIG["max_tokens"], seed=4)
    batches = take(PackedLoader(both, BatchConfig(**CONFIG)), 200)
    pieces = torch.cat([batch.piece[: batch.num_examples] for batch in batches])
    lengths = {0: 0, 1: 0}
    for piece in pieces.tolist():
        lengths[piece >> 40] += len(both.tokens(piece))
    assert lengths[1] / sum(lengths.values()) == pytest.approx(1 / 3, abs=0.02)


def test_a_killed_worker_is_named(shards):
    stream = iter(loader(shards, num_workers=2))
    next(stream)
    victim = sorted(multiprocessing.active_children(), key=lambda child: child.pid)[0]
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=rf"worker \d \(pid {victim.pid}\) died with exit code -9.*step \d+.*piece \d+"):
        exhaust(stream)


def test_a_silent_worker_is_given_up(shards, monkeypatch):
    # torch waits for a worker that has stopped as long again, twice.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    stream = iter(loader(shards, num_workers=1, timeout=2.0))
    next(stream)
    (victim,) = multiprocessing.active_children()
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DataError, match=r"no worker answered for 2 s.*piece \d+"):
            exhaust(stream)
    finally:
        os.kill(victim.pid, signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_shard_is_named_from_workers_too(tmp_path, num_workers):
    shards = write_corpus(tmp_path, made_documents([50] * 30))
    damaged = tmp_path / "train" / "00000.ds"
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"00000\.ds.*piece \d+"):
        take(loader(shards, num_workers=num_workers), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_tokens": 500}, "multiple of 128.*512"),
        ({"decoder_tokens": 128, "max_tokens": 200}, r"decoder_tokens.*smaller than one example.*at least 256"),
        ({"encoder_tokens": 128, "max_tokens": 200}, r"encoder_tokens.*smaller than one example.*at least 256"),
        ({"packs_per_step": 3, "packs_per_micro_batch": 2}, "packs_per_micro_batch"),
        ({"packs_per_step": 3, "world_size": 2}, "2 processes.*Try 4"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"num_workers": -1}, "num_workers"),
        ({"window": 0}, "window"),
        ({"max_tokens": "many"}, "max_tokens"),
    ],
)
def test_shapes_that_cannot_work_are_refused(shards, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        loader(shards, **changes)


def test_a_state_of_something_else_is_refused(shards, tmp_path):
    state = loader(shards).state_dict()
    for other, message in (
        (loader(shards, seed=2), "another seed"),
        (loader(shards, max_tokens=100), "another max_tokens"),
        (loader(shards, window=64), "another packing"),
        (loader(write_corpus(tmp_path, made_documents([30] * 9))), "another data"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            other.load_state_dict(state)
    for broken in ({}, {"version": 1}, state | {"cursor": -1}, state | {"version": 9}, state | {"window": ["a"]}):
        with pytest.raises(ConfigurationError, match="not the state"):
            loader(shards).load_state_dict(broken)
    middle = loader(shards)
    take(middle, 1)
    with pytest.raises(ConfigurationError, match="middle of a step"):
        loader(shards, packs_per_micro_batch=2).load_state_dict(middle.state_dict())


def test_validation_applies_every_denoiser_to_the_same_pieces_always(shards):
    def stream(**options):
        return validation_batches(
            [shards], FAT5, INFO, BatchConfig(**(CONFIG | options.pop("config", {}))), eval_tokens=4000, **options
        )

    whole = stream()
    seen = examples(whole)
    by_denoiser = [sorted(piece for piece, denoiser, *_ in seen if denoiser == index) for index in range(7)]
    assert all(pieces == by_denoiser[0] for pieces in by_denoiser)
    assert len(by_denoiser[0]) == len(set(by_denoiser[0]))
    assert 7 * 4000 <= sum(batch.tokens for batch in whole) < 7 * (4000 + 128)  # the last, partial pack included
    assert examples(stream()) == seen
    for world_size, config in ((1, {"packs_per_micro_batch": 2}), (2, {}), (3, {})):
        ranks = [stream(rank=rank, world_size=world_size, config=config) for rank in range(world_size)]
        assert len({len(rank) for rank in ranks}) == 1
        assert sorted(example for rank in ranks for example in examples(rank)) == sorted(seen)


def test_validation_of_a_small_split_takes_it_whole(shards):
    whole = validation_batches([shards], FAT5, INFO, BatchConfig(**CONFIG), eval_tokens=10**9)
    assert sum(batch.tokens for batch in whole) == 7 * sum(length for length in LENGTHS if length >= 2)
    with pytest.raises(ConfigurationError, match="eval_tokens"):
        validation_batches([shards], FAT5, INFO, BatchConfig(**CONFIG), eval_tokens=0)
