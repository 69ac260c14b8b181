"""Encoded examples: packed batches, the order of training, and where a run continues."""

from itertools import islice

import numpy as np
import pytest
import torch

from fat5.data import BatchConfig
from fat5.errors import ConfigurationError
from fat5.tasks.finetune.examples import ExampleLoader, ExampleSet, ExampleStream

PAD = 0


def made(count=50, seed=0, dtype=np.int64):
    """Examples of 1 to 40 tokens; every token tells its example."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 41, (count, 2))
    inputs = [[100 * index + place + 1 for place in range(length)] for index, length in enumerate(lengths[:, 0])]
    targets = [[100 * index + place + 7 for place in range(length)] for index, length in enumerate(lengths[:, 1])]
    part = [index % 3 for index in range(count)]
    return ExampleSet.of(inputs, targets, part, dtype=dtype)


def config(**changes):
    sizes = {"max_tokens": 128, "encoder_tokens": 128, "decoder_tokens": 128, "packs_per_step": 4, "window": 16}
    return BatchConfig(**(sizes | changes))


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_a_batch_lays_out_what_a_packed_batch_promises(dtype):
    examples, chosen = made(dtype=dtype), np.array([7, 0, 48])
    batch = examples.batch(chosen, config(packs_per_micro_batch=2), PAD)
    assert batch.input_ids.shape == batch.labels.shape == (256,)
    assert batch.cu_seqlens.shape == batch.decoder_cu_seqlens.shape == (batch.piece.numel() + 1,)
    assert batch.input_ids.dtype == batch.piece.dtype == torch.int64
    assert batch.cu_seqlens.dtype == batch.decoder_cu_seqlens.dtype == torch.int32
    assert batch.labels.dtype == (torch.float32 if dtype is np.float32 else torch.int64)
    ends, target_ends = batch.cu_seqlens.tolist(), batch.decoder_cu_seqlens.tolist()
    for place, index in enumerate(chosen):
        assert batch.input_ids[ends[place] : ends[place + 1]].tolist() == examples.input(index).tolist()
        assert batch.labels[target_ends[place] : target_ends[place + 1]].tolist() == examples.target(index).tolist()
    assert ends[0] == target_ends[0] == 0
    assert set(ends[3:]) == {batch.tokens}
    assert set(target_ends[3:]) == {batch.num_items}
    assert (batch.input_ids[batch.tokens :] == PAD).all()
    assert (batch.labels[batch.num_items :] == -100).all()
    assert (batch.max_seqlen, batch.decoder_max_seqlen) == (examples.input_lengths.max(), examples.target_lengths.max())
    assert batch.piece.tolist() == [7, 0, 48] + [-1] * (batch.piece.numel() - 3)
    assert batch.denoiser.tolist() == [1, 0, 0] + [-1] * (batch.piece.numel() - 3)
    assert batch.num_examples == 3


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_batches_hold_every_example_once(world_size):
    examples = made()
    ranks = [examples.batches(config(), PAD, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    found = [index for batches in ranks for batch in batches for index in batch.piece.tolist() if index >= 0]
    assert sorted(found) == list(range(50))


def pieces(batches):
    return [batch.piece[batch.piece >= 0].tolist() for batch in batches]


def loader(seed=0, rank=0, world_size=1, **changes):
    stream = ExampleStream(made(), seed, PAD, "hash")
    return ExampleLoader(stream, config(**changes), rank=rank, world_size=world_size)


def test_each_pass_is_a_permutation_of_its_own():
    stream = ExampleStream(made(), 3, PAD, "hash")
    order = stream.resolve(np.arange(200)).piece.reshape(4, 50)
    assert (np.sort(order, axis=1) == np.arange(50)).all()
    assert len({tuple(turn) for turn in order.tolist()}) == 4
    shuffled = np.random.default_rng(0).permutation(200)  # any position alone, in any order
    assert (stream.resolve(shuffled).piece == order.ravel()[shuffled]).all()
    other = ExampleStream(made(), 4, PAD, "hash").resolve(np.arange(50)).piece
    assert (other != order[0]).any()
    encoder, decoder = stream.lengths(shuffled)
    assert (encoder == stream.examples.input_lengths[order.ravel()[shuffled]]).all()
    assert (decoder == stream.examples.target_lengths[order.ravel()[shuffled]]).all()
    assert stream.passes(75) == [1.5]


def test_one_example_is_every_pass():
    assert ExampleStream(made(1), 0, PAD, "hash").resolve(np.arange(5)).piece.tolist() == [0] * 5


def test_a_state_of_any_batch_goes_on_there():
    whole = loader()
    batches, states = [], [whole.state_dict()]
    for batch in islice(iter(whole), 24):
        batches.append(batch)
        states.append(whole.state_dict())
    expected = pieces(batches)
    counts = np.bincount(np.concatenate(expected), minlength=50)
    assert counts.max() - counts.min() <= 2  # passes follow one another, but for the few that wait in the window
    for done in (0, 1, 3, 4, 10, 23):
        other = loader()
        other.load_state_dict(states[done])
        assert pieces(islice(iter(other), 24 - done)) == expected[done:]
    with pytest.raises(ConfigurationError, match="another seed"):
        loader(seed=1).load_state_dict(states[4])


def test_ranks_share_a_step_without_overlap():
    one = pieces(islice(iter(loader()), 8))
    two = [pieces(islice(iter(loader(rank=rank, world_size=2)), 4)) for rank in (0, 1)]
    assert one == [*two[0][:2], *two[1][:2], *two[0][2:], *two[1][2:]]
