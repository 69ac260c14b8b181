"""DataCollatorForUL2: examples, noise, cutting, errors; in DataLoader, Dataset.map and with_transform."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer as Backend
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fat5.data import DataCollatorForUL2, Denoiser, MixtureOfDenoisers, PieceStream, reconstruct
from fat5.data.examples.collator import cut
from fat5.data.tokenizer.json_file import byte_tokenizer
from fat5.data.tokenizer.loading import Tokenizer
from fat5.errors import ConfigurationError, DataError, TokenizerError
from made_corpus import write_corpus
from made_tokenizers import KINDS, SENTINELS

BYTES = Tokenizer(byte_tokenizer(), None, {})
INFO = BYTES.info
LENGTHS = [60, 2, 100, 31, 129, 300, 257, 1, 0, 64]


def documents(lengths=LENGTHS) -> list[np.ndarray]:
    return [np.random.default_rng(number).integers(3, 259, length) for number, length in enumerate(lengths)]


def features(lengths=(60, 2, 100, 31)) -> list[dict]:
    return [{"input_ids": document.tolist()} for document in documents(lengths)]


def collator(**options) -> DataCollatorForUL2:
    return DataCollatorForUL2(BYTES, **({"max_tokens": 128} | options))


def rows(batch) -> list[tuple[np.ndarray, np.ndarray]]:
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        (ids[:length].numpy(), labels[labels != -100].numpy())
        for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths)
    ]


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_a_batch_is_padded_and_gives_its_documents_back(multiple):
    given = features()
    batch = collator(pad_to_multiple_of=multiple)(given)
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    assert all(tensor.dtype == torch.int64 and tensor.shape[0] == 4 for tensor in batch.values())
    assert all(tensor.shape[1] % multiple == 0 for tensor in batch.values())
    assert batch["input_ids"].shape[1] < max(len(source) for source, _ in rows(batch)) + multiple
    assert (batch["input_ids"][batch["attention_mask"] == 0] == INFO.pad_id).all()
    for (source, target), feature in zip(rows(batch), given):
        assert source[0] in INFO.mode_ids.values()
        assert source[-1] == target[-1] == INFO.eos_id
        assert reconstruct(source, target, INFO).tolist() == feature["input_ids"]


def test_an_indexed_document_is_the_stream_s_example(tmp_path):
    shards = write_corpus(tmp_path, documents(), shards=2, info=INFO)
    stream = PieceStream([shards], MixtureOfDenoisers.named("fat5"), INFO, max_tokens=128, seed=7)
    examples = stream.resolve(np.arange(3 * stream.num_pieces[0]))  # three passes
    given = [
        {"input_ids": stream.tokens(int(piece)), "index": piece, "epoch": int(epoch)}
        for piece, epoch in zip(examples.piece, examples.epoch)
    ]
    inputs, targets, cu_inputs, cu_targets = stream.write(examples)
    made = rows(collator(seed=7)(given))
    assert [source.tolist() for source, _ in made] == [part.tolist() for part in np.split(inputs, cu_inputs[1:-1])]
    assert [target.tolist() for _, target in made] == [part.tolist() for part in np.split(targets, cu_targets[1:-1])]


def test_an_index_decides_the_noise_wherever_the_document_stands():
    given = [feature | {"index": number} for number, feature in enumerate(features())]
    first = collator()
    whole = rows(first(given))
    first(given[:1])
    for number in (3, 1):
        (alone,) = rows(first([given[number]]))
        assert [part.tolist() for part in alone] == [part.tolist() for part in whole[number]]
    assert not equal(first(given), first([feature | {"epoch": 1} for feature in given]))
    assert not equal(first(given), collator(seed=1)(given))


def test_one_denoiser_is_the_denoiser():
    denoiser = Denoiser(3.0, 0.5, None, "[X]")
    (made,) = rows(collator(mixture=[denoiser], seed=5)([features()[0] | {"index": 9, "epoch": 2}]))
    wanted = denoiser(documents()[0], INFO, seed=5, epoch=2, piece=9)
    assert [part.tolist() for part in made] == [part.tolist() for part in wanted]


def test_noise_goes_on_within_a_process_and_starts_again_with_a_new_collator():
    one, given = collator(mixture="t5"), features((100, 100))
    first, second = one(given), one(given)
    assert not equal(first, second)
    again = collator(mixture="t5")
    assert equal(again(given), first)
    assert equal(again(given), second)
    one_by_one = collator(mixture="t5")
    singly = [rows(one_by_one([feature]))[0] for feature in given]
    assert [[part.tolist() for part in row] for row in singly] == [[p.tolist() for p in row] for row in rows(first)]
    assert equal(copy.copy(one)(given), first)  # a copy begins anew


def test_ranks_draw_their_own_noise(monkeypatch):
    given, made = features((100,)), []
    for rank in ("0", "1", "nonsense"):
        monkeypatch.setenv("RANK", rank)
        made.append(collator(mixture="t5")(given))
    assert not equal(made[0], made[1])
    assert equal(made[0], made[2])


def epochs(num_workers, persistent=False, seed=0, context=None) -> list[list[list[int]]]:
    """The inputs of two epochs over one document many times, as a DataLoader gives them."""
    torch.manual_seed(seed)
    loader = DataLoader(
        features((100,)) * 12,  # type: ignore[arg-type]
        batch_size=3,
        num_workers=num_workers,
        collate_fn=collator(mixture="t5"),
        persistent_workers=persistent,
        multiprocessing_context=context,
    )
    return [[row for batch in loader for row in batch["input_ids"].tolist()] for _ in range(2)]


@pytest.mark.parametrize(
    ("num_workers", "persistent", "context"),
    [(0, False, None), (2, False, "fork"), (2, True, "fork"), pytest.param(1, False, "spawn", marks=pytest.mark.slow)],
)
def test_workers_and_epochs_never_repeat_noise_and_a_seed_repeats_all(num_workers, persistent, context):
    first = epochs(num_workers, persistent, context=context)
    seen = [tuple(row) for epoch in first for row in epoch]
    assert len(set(seen)) == len(seen) == 24
    if context != "spawn":  # one start is slow enough
        assert epochs(num_workers, persistent, context=context) == first


def test_text_and_ids_give_the_same_batch():
    texts = ["Le noyau </s> est un logiciel <extra_id_0> libre.", "deux"]
    ids = [BYTES.encode(text) for text in texts]
    assert equal(collator()([{"text": t} for t in texts]), collator()([{"input_ids": i} for i in ids]))
    other = [{"input_ids": torch.tensor(i), "attention_mask": [1] * len(i), "text": "not read"} for i in ids]
    assert equal(collator()(other), collator()([{"input_ids": np.array(i, np.uint16)} for i in ids]))


@pytest.mark.parametrize("kind", KINDS)
def test_stock_tokenizers_serve_as_objects_and_as_folders(tmp_path, kind):
    folder = KINDS[kind](tmp_path)
    stock = AutoTokenizer.from_pretrained(folder)
    given = [{"text": "le noyau de un paquet, pour le noyau"}] * 3
    one, other = DataCollatorForUL2(stock), DataCollatorForUL2(folder)
    batch = one(given)
    assert equal(batch, other(given))
    assert len(one.tokenizer.info.sentinel_ids) == (125 if kind == "byte_t5" else SENTINELS)
    modes = set(one.tokenizer.info.mode_ids.values())
    assert min(modes) >= len(stock)
    assert set(batch["input_ids"][:, 0].tolist()) <= modes
    raw = one.tokenizer.encode(given[0]["text"])
    assert all(reconstruct(*row, one.tokenizer.info).tolist() == raw for row in rows(batch))
    without = DataCollatorForUL2(stock, "t5")(given)
    assert int(without["input_ids"].max()) < len(stock)


def test_mixtures_come_by_name_as_lists_and_made():
    given = [feature | {"index": number} for number, feature in enumerate(features())]
    rows_of = [{"mu": 3.0, "r": 0.15}]
    for same in (rows_of, [Denoiser(3.0, 0.15)], MixtureOfDenoisers.named("t5")):
        assert equal(collator(mixture=same)(given), collator(mixture="t5")(given))
    half = collator(mixture="prefix-lm")([given[0]])
    assert rows(half)[0][0].size == 30 + 2


def test_spans_that_the_sentinels_limit_are_reported_once(caplog):
    made = collator(max_tokens=1024)
    made([{"input_ids": [5] * 1024}])
    (message,) = caplog.messages
    # 377 = round(754 / 2) hidden tokens want 126 spans.
    assert message.startswith("denoiser [X] mu=3 r=0.5: the tokenizer's 125 sentinels make fewer, longer spans")
    assert message.endswith("in pieces of 754 tokens and more")


@pytest.mark.parametrize("length", [0, 1, 2, 127, 128, 129, 130, 256, 257, 300])
def test_cutting_is_the_stream_s(tmp_path, length):
    document = documents([length])[0]
    pieces = cut(document, 128)
    if length < 2:
        assert not pieces
        return
    shards = write_corpus(tmp_path, [document], info=INFO)
    stream = PieceStream([shards], MixtureOfDenoisers.named("t5"), INFO, max_tokens=128, seed=0)
    assert [piece.tolist() for piece in pieces] == [stream.tokens(p).tolist() for p in range(stream.num_pieces[0])]
    assert np.concatenate(pieces).tolist() == document.tolist()


def test_map_cuts_documents_and_the_collator_takes_them(caplog):
    texts = ["mot " * 100, "", "x", "court"]
    made = collator()
    data = Dataset.from_dict({"text": texts, "other": [0] * 4})
    cut_up = data.map(made.pieces, batched=True, remove_columns=data.column_names)
    assert [len(row["input_ids"]) for row in cut_up] == [128, 128, 128, 16, 5]
    assert caplog.text.count("2 of 4 documents have fewer than 2 tokens") == 1
    streamed = data.to_iterable_dataset().map(made.pieces, batched=True, remove_columns=data.column_names)
    assert [list(row["input_ids"]) for row in streamed] == cut_up["input_ids"][:]
    joined = [token for row in list(cut_up)[:4] for token in row["input_ids"]]
    assert BYTES.decode(joined) == texts[0]
    again = Dataset.from_dict({"input_ids": [BYTES.encode(text) for text in texts]}).map(made.pieces, batched=True)
    assert again["input_ids"][:] == cut_up["input_ids"][:]
    loader = DataLoader(cut_up, batch_size=5, collate_fn=made)
    (batch,) = loader
    assert [reconstruct(*row, INFO).tolist() for row in rows(batch)] == cut_up["input_ids"][:]


def test_a_transform_gives_raw_ids_and_positions():
    data = Dataset.from_dict({"text": ["un", "deux", "trois mots ici"], "index": [0, 1, 2]})
    plain = collator()([{"text": row["text"], "index": row["index"]} for row in data])
    seen = data.with_transform(
        lambda batch: {"input_ids": [BYTES.encode(text) for text in batch["text"]], "index": batch["index"]}
    )
    (batch,) = DataLoader(seen, batch_size=3, collate_fn=collator())
    assert equal(batch, plain)
    (batch,) = DataLoader(data.with_format("torch"), batch_size=3, collate_fn=collator())
    assert equal(batch, plain)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "got no feature"),
        ({"input_ids": [[1]]}, "takes a list of features"),
        (["text"], "takes a list of features"),
        ([{"label": 1}], r"document 0: holds neither input_ids nor text, but label.*remove_unused_columns=False"),
        ([{}], "but nothing.*remove_unused_columns=False"),
        ([{"input_ids": [5, 6]}, {"text": "x"}], "document 1: holds no input_ids, and others have"),
        ([{"text": "bon"}, {"text": None}], "document 1: text is NoneType, not a string"),
        ([{"text": ["a", "b"]}], "document 0: text is list, not a string"),
        ([{"input_ids": ["a", "b"]}], "list of whole numbers"),
        ([{"input_ids": [1.5, 2.5]}], "list of whole numbers"),
        ([{"input_ids": None}], "list of whole numbers"),
        ([{"input_ids": [[5, 6], [7]]}], "list of whole numbers"),
        ([{"input_ids": [[5, 6]]}], "list of whole numbers"),
        ([{"input_ids": [5, 6, -1]}], "id -1 is not in the tokenizer's vocabulary"),
        ([{"input_ids": [5, 9999]}], "id 9999 is not in the tokenizer's vocabulary of 512"),
        ([{"input_ids": [5, 6, 1]}], r"special token </s>.*add_special_tokens=False"),
        ([{"input_ids": [5, 6, 0]}], "special token <pad>"),
        ([{"input_ids": [5, 6]}, {"input_ids": [259, 6]}], "document 1: .*<extra_id_0>"),
        ([{"text": "long" * 33}], r"132 tokens is longer than max_tokens 128.*collator\.pieces"),
        ([{"text": "bon"}, {"text": ""}], r"document 1: a document of 0 tokens is too short.*collator\.pieces"),
        ([{"input_ids": [5]}], r"a document of 1 token is too short"),
        ([{"text": "bon", "index": -1}], "index: must be a whole number"),
        ([{"text": "bon", "index": 1.0}], "index: must be a whole number"),
        ([{"text": "bon", "index": True}], "index: must be a whole number"),
        ([{"text": "bon", "index": 1 << 63}], "index: must be a whole number"),
        ([{"text": "bon", "index": 1, "epoch": 1 << 28}], "epoch: must be a whole number"),
        ([{"text": "bon", "index": 1}, {"text": "bon"}], "1 of 2 features have an index"),
    ],
)
def test_what_is_no_document_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        collator()(given)


def test_map_of_no_known_column_is_refused():
    with pytest.raises(DataError, match="no column input_ids or text among body"):
        collator().pieces({"body": ["x"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": "ul3"}, "no mixture is named"),
        ({"mixture": []}, "1 to 127"),
        ({"mixture": 3}, "name or a list"),
        ({"max_tokens": 4}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of"),
        ({"pad_to_multiple_of": None}, "pad_to_multiple_of"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        collator(**changes)


def test_tokenizers_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(TokenizerError, match="no such tokenizer"):
        DataCollatorForUL2(tmp_path / "none")
    with pytest.raises(TokenizerError, match="int: has no fast"):
        DataCollatorForUL2(3)
    content = byte_tokenizer()
    content["added_tokens"] = content["added_tokens"][:3]
    backend = Backend.from_str(json.dumps(content))
    stock = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    with pytest.raises(TokenizerError, match="no sentinel"):
        DataCollatorForUL2(stock)


def test_the_name_comes_without_torch():
    code = "import sys, fat5.data; assert 'DataCollatorForUL2' in dir(fat5.data); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
