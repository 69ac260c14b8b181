"""UL2Examples and UL2Dataset: the pipeline's examples, shared among workers and ranks, continued at no cost."""

import json
import pickle

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

from fat5.data import (
    BatchConfig,
    MixtureOfDenoisers,
    PackedLoader,
    PieceStream,
    UL2Dataset,
    UL2Examples,
    WeightedShards,
    open_shards,
    unpack,
)
from fat5.data.tokenizer.json_file import byte_tokenizer
from fat5.data.tokenizer.loading import Tokenizer
from fat5.errors import ConfigurationError, DataError, TokenizerError
from made_corpus import write_corpus

BYTES = Tokenizer(byte_tokenizer(), None, {})
INFO = BYTES.info
FAT5 = MixtureOfDenoisers.named("fat5")
LENGTHS = np.random.default_rng(3).integers(0, 300, 60)


def write(folder, lengths=LENGTHS):
    documents = [np.random.default_rng(number).integers(3, 259, length) for number, length in enumerate(lengths)]
    BYTES.save(folder / "tokenizer")
    return write_corpus(folder, documents, shards=2, info=INFO)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def stream(shards):
    return PieceStream([shards], FAT5, INFO, max_tokens=128, seed=5)


def endless(shards, **options) -> UL2Dataset:
    return UL2Dataset(shards.folder, **({"max_tokens": 128, "seed": 5} | options))


def wanted(stream, positions) -> list[tuple[list[int], list[int]]]:
    """What the pipeline makes at stream positions."""
    inputs, targets, cu_inputs, cu_targets = stream.write(stream.resolve(np.array(positions, np.int64)))
    parts = zip(np.split(inputs, cu_inputs[1:-1]), np.split(targets, cu_targets[1:-1]))
    return [(source.tolist(), target.tolist()) for source, target in parts]


def pairs(examples) -> list[tuple[list[int], list[int]]]:
    return [(example["input_ids"].tolist(), example["labels"].tolist()) for example in examples]


def rows(batch) -> list[tuple[list[int], list[int]]]:
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        (ids[:length].tolist(), labels[labels != -100].tolist())
        for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths)
    ]


def take(iterable, count) -> list:
    iterator = iter(iterable)
    return [next(iterator) for _ in range(count)]


def test_examples_are_those_of_the_stream(shards, stream):
    count = 2 * stream.num_pieces[0] + 5
    positions = range(count)
    assert pairs(take(endless(shards), count)) == wanted(stream, positions)
    by_position = UL2Examples(shards.folder, max_tokens=128, seed=5, num_examples=count)
    assert len(by_position) == count
    assert pairs(by_position) == wanted(stream, positions)
    assert pairs([by_position[17]]) == wanted(stream, [17])
    assert all(example["labels"].dtype == example["input_ids"].dtype == np.int64 for example in by_position)
    assert pairs(take(endless(shards, position=count - 3), 4)) == wanted(stream, range(count - 3, count + 1))


def test_examples_are_those_of_the_packed_loader(shards, stream):
    config = BatchConfig(max_tokens=128, encoder_tokens=512, decoder_tokens=512, packs_per_step=1, window=32)
    one_pass = stream.resolve(np.arange(stream.num_pieces[0])).piece.tolist()
    examples = dict(zip(one_pass, pairs(UL2Examples(shards, max_tokens=128, seed=5))))
    packed: dict[int, tuple[list[int], list[int]]] = {}
    batches = take(PackedLoader(stream, config), 4)
    for batch in batches:
        parts = [(source.tolist(), target.tolist()) for source, target in unpack(batch)]
        packed |= dict(zip(batch.piece.tolist(), parts))
    assert len(packed) == sum(batch.num_examples for batch in batches) > 20
    assert all(examples[piece] == example for piece, example in packed.items())


def test_a_pass_is_the_default_length(tmp_path, shards, stream):
    assert len(UL2Examples(shards, max_tokens=128)) == stream.num_pieces[0]
    small = write(tmp_path, [50] * 10)
    both = UL2Examples([WeightedShards(shards, 1.0), small], max_tokens=128)
    assert min(both.stream.passes(len(both))) >= 1
    assert min(both.stream.passes(len(both) - 1)) < 1
    assert len(UL2Examples(small.folder, max_tokens=128, split="validation")) == 10


def test_positions_outside_are_refused(shards):
    examples = UL2Examples(shards, max_tokens=128, num_examples=3)
    for position in (-1, 3):
        with pytest.raises(IndexError, match=rf"position {position} of 3"):
            examples[position]


def test_batches_are_padded_and_so_by_the_stock_collator(shards):
    examples = UL2Examples(shards, max_tokens=128, seed=5)
    stock = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(shards.folder / "tokenizer"), pad_to_multiple_of=8)
    (ours,) = take(DataLoader(examples, batch_size=6, collate_fn=examples.collate), 1)
    (theirs,) = take(DataLoader(examples, batch_size=6, collate_fn=stock), 1)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(DataError, match="no example"):
        examples.collate([])


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_give_the_batches_of_one_process(shards, stream, num_workers):
    dataset = endless(shards, batch_size=4)
    loader = DataLoader(dataset, batch_size=4, num_workers=num_workers, collate_fn=dataset.collate)
    found = [row for batch in take(loader, 40) for row in rows(batch)]
    assert found == wanted(stream, range(160))


def test_workers_of_another_batch_size_share_without_duplicates(shards, stream):
    dataset = endless(shards)
    loader = DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=dataset.collate)
    found = [row for batch in take(loader, 10) for row in rows(batch)]
    assert sorted(found) == sorted(wanted(stream, range(40)))


def test_ranks_share_and_a_step_is_the_same_for_any_workers(shards, stream):
    for num_workers in (0, 2):
        ranks = [endless(shards, batch_size=2, rank=rank, world_size=3) for rank in range(3)]
        loaders = [DataLoader(r, batch_size=2, num_workers=num_workers, collate_fn=r.collate) for r in ranks]
        batches = [take(loader, 5) for loader in loaders]
        found = [row for step in range(5) for rank in batches for row in rows(rank[step])]
        assert found == wanted(stream, range(30))


@pytest.mark.parametrize("kind", ["examples", "endless"])
def test_accelerate_shares_among_ranks(shards, stream, kind):
    dataset = UL2Examples(shards, max_tokens=128, seed=5) if kind == "examples" else endless(shards, batch_size=4)
    loader = DataLoader(dataset, batch_size=2, collate_fn=dataset.collate)
    ranks = [
        take(prepare_data_loader(loader, num_processes=2, process_index=rank, dispatch_batches=False), 6)
        for rank in range(2)
    ]
    found = [row for step in range(6) for rank in ranks for row in rows(rank[step])]
    assert found == wanted(stream, range(24))


@pytest.mark.parametrize("made", [0, 1, 4, 6, 64, 70])
def test_a_state_continues_with_the_next_example(shards, stream, made):
    first = endless(shards, batch_size=4, position=10)
    iterator = iter(first)
    for _ in range(made):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    again = endless(shards, batch_size=4)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert pairs(take(again, 9)) == wanted(stream, range(10 + made, 19 + made))
    assert pairs(take(again, 2)) == wanted(stream, range(10 + made, 12 + made))  # each iterator starts there
    again.position = 3
    assert pairs(take(again, 2)) == wanted(stream, [3, 4])


def test_a_state_continues_under_another_world_after_whole_batches(shards, stream):
    first = endless(shards, batch_size=2, rank=1, world_size=2)
    take(first, 6)
    alone = endless(shards, batch_size=5)
    alone.load_state_dict(first.state_dict())
    assert pairs(take(alone, 7)) == wanted(stream, range(12, 19))
    take(first, 7)
    with pytest.raises(ConfigurationError, match="middle of a batch"):
        alone.load_state_dict(first.state_dict())
    same = endless(shards, batch_size=2, rank=0, world_size=2)
    same.load_state_dict(first.state_dict())
    assert pairs(take(same, 3)) == wanted(stream, [13, 16, 17])


def test_continuing_reads_nothing_before(shards, monkeypatch):
    dataset = endless(shards, position=10**12)
    read = []
    real = PieceStream.resolve
    monkeypatch.setattr(PieceStream, "resolve", lambda self, positions: read.append(positions) or real(self, positions))
    take(dataset, 1)
    assert min(map(min, read)) == 10**12
    assert sum(map(len, read)) <= 64


def test_a_state_of_something_else_is_refused(shards):
    state = endless(shards).state_dict()
    for changes, message in (({"seed": 6}, "another seed"), ({"mixture": "ul2"}, "another mixture")):
        with pytest.raises(ConfigurationError, match=message):
            endless(shards, **changes).load_state_dict(state)
    for broken in ({}, state | {"version": 9}, state | {"position": -1}, state | {"made": "x"}, 3):
        with pytest.raises(ConfigurationError, match="not the state"):
            endless(shards).load_state_dict(broken)
    with pytest.raises(ConfigurationError, match="another data, seed"):
        endless(shards).load_state_dict(state | {"fingerprint": None})


def test_datasets_travel_to_spawned_workers(shards, stream):
    dataset = pickle.loads(pickle.dumps(endless(shards, batch_size=2, position=4)))
    assert pairs(take(dataset, 3)) == wanted(stream, range(4, 7))
    examples = pickle.loads(pickle.dumps(UL2Examples(shards, max_tokens=128, seed=5)))
    assert pairs([examples[9]]) == wanted(stream, [9])


def test_documents_too_short_are_reported(shards, caplog):
    endless(shards)
    assert "fewer than 2 tokens" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"position": -1}, "position"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"mixture": "ul3"}, "no mixture"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_that_cannot_work_are_refused(shards, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        endless(shards, **changes)


def test_sources_that_cannot_work_are_refused(tmp_path, shards):
    with pytest.raises(ConfigurationError, match="no data source"):
        UL2Dataset([])
    with pytest.raises(ConfigurationError, match="num_examples"):
        UL2Examples(shards, num_examples=0)
    with pytest.raises(DataError, match="manifest"):
        UL2Dataset(tmp_path)
    with pytest.raises(DataError, match="no split"):
        UL2Dataset(shards.folder, split="test")
    write_corpus(tmp_path, [np.arange(3, 50)], info=INFO)
    with pytest.raises(TokenizerError, match="tokenizer"):
        UL2Dataset(open_shards(tmp_path))
