import numpy as np
import pytest
import torch

from fat5.data import MixtureOfDenoisers, PaddedLoader, PieceStream, reconstruct
from fat5.data.examples.padded import GROUP_BATCHES
from fat5.errors import ConfigurationError
from made_corpus import made_documents, made_info, write_corpus

INFO = made_info()
FAT5 = MixtureOfDenoisers.named("fat5")
LENGTHS = np.random.default_rng(3).integers(2, 200, 150)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), made_documents(LENGTHS))


def loader(shards, **options) -> PaddedLoader:
    return PaddedLoader(PieceStream([shards], FAT5, INFO, max_tokens=128, seed=1), **({"batch_size": 4} | options))


def take(iterable, count):
    iterator = iter(iterable)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def rows(batch) -> list[tuple[np.ndarray, np.ndarray]]:
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        (ids[:length].numpy(), labels[labels != -100].numpy())
        for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths)
    ]


def test_padding_is_dynamic_to_a_multiple_of_8_and_marked(shards):
    widths = set()
    for batch in take(loader(shards), 30):
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        lengths = mask.sum(1)
        assert ids.shape[0] == labels.shape[0] == 4
        assert ids.shape == mask.shape
        assert ids.shape[1] == -(-int(lengths.max()) // 8) * 8
        assert labels.shape[1] % 8 == 0
        assert int((labels != -100).sum(1).max()) > labels.shape[1] - 8
        assert (ids[mask == 0] == INFO.pad_id).all()
        assert (mask.diff() <= 0).all()  # padding on the right only
        widths.add(ids.shape[1])
    assert len(widths) > 5


def test_padded_batches_hold_the_same_examples_as_the_stream(shards):
    stream = loader(shards)
    count = stream.stream.num_pieces[0]
    batches = take(stream, GROUP_BATCHES)
    assert GROUP_BATCHES * 4 >= count
    wanted = sorted(
        stream.stream.tokens(piece).tolist()
        for piece in stream.stream.resolve(np.arange(GROUP_BATCHES * 4)).piece.tolist()
    )
    found = sorted(reconstruct(*row, INFO).tolist() for batch in batches for row in rows(batch))
    assert found == wanted
    assert sum(batch.tokens for batch in batches) == sum(map(len, wanted))


def test_grouping_by_length_saves_padding(shards):
    batches = take(loader(shards), GROUP_BATCHES)
    used = sum(int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum()) for batch in batches)
    assert used / sum(batch["input_ids"].numel() + batch["labels"].numel() for batch in batches) > 0.8
    in_order = [row for batch in batches for row in rows(batch)]
    np.random.default_rng(0).shuffle(in_order)
    room = sum(
        4 * (max(len(a) for a, _ in group) + max(len(b) for _, b in group))
        for group in (in_order[i : i + 4] for i in range(0, len(in_order), 4))
    )
    assert used / room < 0.65


def test_workers_ranks_and_restoring_change_nothing(shards):
    reference = take(loader(shards), GROUP_BATCHES + 9)
    helped = take(loader(shards, num_workers=2), 9)
    assert all(torch.equal(left["labels"], right["labels"]) for left, right in zip(reference, helped))
    first = loader(shards)
    take(first, GROUP_BATCHES + 3)
    again = loader(shards)
    again.load_state_dict(first.state_dict())
    for left, right in zip(take(again, 4), reference[GROUP_BATCHES + 3 :]):
        assert torch.equal(left["input_ids"], right["input_ids"])
    ranks = [take(loader(shards, batch_size=2, rank=rank, world_size=2), GROUP_BATCHES) for rank in range(2)]
    found = sorted(row[0].tolist() for rank in ranks for batch in rank for row in rows(batch))
    assert found == sorted(row[0].tolist() for batch in reference[:GROUP_BATCHES] for row in rows(batch))


def test_a_batch_size_that_cannot_work_is_refused(shards):
    with pytest.raises(ConfigurationError, match="batch_size"):
        loader(shards, batch_size=0)
