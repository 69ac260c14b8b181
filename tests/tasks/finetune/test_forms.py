"""Forms of tasks: the examples that they make of a table's rows, their order, and their packed batches."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fat5.data import load_tokenizer
from fat5.data.tokenizer.loading import Tokenizer
from fat5.errors import ConfigurationError, DataError
from fat5.tasks.finetune.answers import Answers
from fat5.tasks.finetune.classes import Classification, Regression
from fat5.tasks.finetune.config import Columns, FinetuneConfig, TaskData
from fat5.tasks.finetune.splits import FORMS
from fat5.tasks.finetune.table import Table
from fat5.tasks.finetune.tags import Tagging

LETTERS = "abcdefghijklmnopqrstuvwxyzéèABNY.,'12⁄"
NORMALIZERS = {
    # As T5's own nmt_nfkc: removes characters without width, composes, takes compatible characters, collapses spaces.
    "nmt_nfkc": [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")],
    "nfc": [normalizers.NFC()],
    "lowercase": [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()],
}
CAFE, FIN, ZERO_WIDTH = "cafe\u0301", "\ufb01n", "\u200b"  # decomposed; with a ligature; a space to nmt_nfkc
CONTEXT = f"Le  noyau \U0001f600 d'un {CAFE}, ½ {FIN} {ZERO_WIDTH} New York."


def unigram(steps):
    """T5's kind of tokenizer, behind a normalizer."""
    pieces = [("▁", -3.0), ("▁le", -2.5), ("▁no", -2.5), ("yau", -2.5), *((letter, -4.0) for letter in LETTERS)]
    backend = Backend(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces], 2, False))
    backend.normalizer, backend.pre_tokenizer = normalizers.Sequence(steps), pre_tokenizers.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", *(f"<extra_id_{index}>" for index in range(4))])
    return Tokenizer(json.loads(backend.to_str()), None, {})


@pytest.fixture(scope="module", params=["bpe", *NORMALIZERS])
def tokenizer(request):
    """FAT5's own BPE with byte fallback, or a Unigram behind each normalizer."""
    if request.param == "bpe":
        return load_tokenizer(request.getfixturevalue("base") / "model")
    return unigram(NORMALIZERS[request.param])


@pytest.fixture(scope="module")
def plain():
    return unigram(NORMALIZERS["nmt_nfkc"])


def table_of(rows):
    table = Table()
    table.rows, table.files = rows, ["made"]
    table.file, table.number = [0] * len(rows), list(range(1, len(rows) + 1))
    return table


def form_of(task, tokenizer, *, class_weights=None, **data):
    return FORMS[task](FinetuneConfig(task=task, data=TaskData(**data), class_weights=class_weights), tokenizer)


def question(context, answer=None, text="Quoi ?"):
    spans = {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    return {"question": text, "context": context, "answers": spans}


@pytest.mark.parametrize("answer", ["Le", "noyau", CAFE, f"un {CAFE}", "½", FIN, "New York.", "\U0001f600"])
def test_gold_spans_decode_to_the_answer(tokenizer, answer):
    form: Answers = form_of("question-answering", tokenizer)
    examples = form.encode(table_of([question(CONTEXT, answer)]))
    assert len(examples) == 1
    start, end = torch.zeros(2, len(examples.input(0)))
    start[examples.target(0)[0]] = end[examples.target(0)[1]] = 9.0
    text, score, none = form.predictions(start, end, examples.notes[0], CONTEXT)
    assert text == answer
    assert score > none


def test_windows_of_answers_cover_every_token_and_share_the_stride(tokenizer):
    context = "le noyau d'un paquet " * 12 + "fin"
    form: Answers = form_of("question-answering", tokenizer, max_source_tokens=40, stride=7)
    table = table_of([question(context, "fin"), question("le noyau", "noyau"), question(context)])
    examples = form.encode(table)
    [(ids, offsets)] = tokenizer.encode_with_offsets([context])
    head = [*tokenizer.encode_with_offsets(["Quoi ?"])[0][0], tokenizer.info.eos_id]
    windows = [examples.input(index).tolist() for index in range(len(examples)) if examples.rows[index] == 0]
    assert len(windows) > 2
    covered = []
    for number, window in enumerate(windows):
        assert len(window) <= 40
        assert window[: len(head)] == head
        assert window[-1] == tokenizer.info.eos_id
        inner = window[len(head) : -1]
        assert number == 0 or covered[-7:] == inner[:7]
        covered += inner[7 * (number > 0) :]
    assert covered == ids
    targets = [examples.target(index).tolist() for index in range(len(examples))]
    for window, target in zip(windows[:-1], targets, strict=False):  # "no answer here" is at EOS
        assert target == [len(window) - 1] * 2
    answer = sum(end > context.index("fin") for _, end in offsets)
    assert targets[len(windows) - 1] == [len(windows[-1]) - 1 - answer, len(windows[-1]) - 2]
    assert examples.rows.tolist().count(1) == 1  # a context shorter than a window, though stride is above its length
    assert all(target[0] == target[1] for row, target in zip(examples.rows, targets, strict=True) if row == 2)
    assert examples.cut == 0


def test_an_answer_longer_than_a_window_is_counted_or_refused(plain):
    context = "noyau " * 40
    rows = [question(context, context.strip()), question(context, "noyau")]
    form = form_of("question-answering", plain, max_source_tokens=32, stride=8)
    assert form.encode(table_of(rows)).cut == 1
    form.config.data.too_long = "refuse"
    with pytest.raises(DataError, match="made, row 1: the answer is longer than a window"):
        form.encode(table_of(rows))


def test_an_answer_without_tokens_and_a_question_without_room_are_refused(plain):
    form = form_of("question-answering", plain, max_source_tokens=32, stride=8)
    with pytest.raises(DataError, match="removes every character of the answer"):
        form.encode(table_of([question("le noyau\x01", "\x01")]))
    with pytest.raises(DataError, match="leaves 0 for the context"):
        form.encode(table_of([question("le noyau", "noyau", text="noyau " * 20)]))


def test_tags_stand_at_the_first_token_of_each_word(tokenizer):
    words = ["Le", "", "noyau", FIN, "\U0001f600", ZERO_WIDTH, CAFE, "New York", " ", "½", ""]
    tags = [f"T{index}" for index in range(len(words))]
    form: Tagging = form_of("token-classification", tokenizer)
    table = table_of([{"tokens": words, "tags": tags}])
    form.learn(table)
    examples = form.encode(table)
    [(ids, offsets)] = tokenizer.encode_with_offsets([" ".join(words)])
    assert examples.input(0).tolist() == [*ids, tokenizer.info.eos_id]
    target, begin = examples.target(0), np.cumsum([0, *(len(word) + 1 for word in words)])
    assert target[-1] == -100
    tagged = [tags.index(form.label_names[label]) for label in target if label >= 0]
    assert tagged == [word for word, _ in examples.notes[0]]
    for word, place in examples.notes[0]:
        assert form.label_names[target[place]] == tags[word]
        assert begin[word] < offsets[place][1] <= begin[word + 1]  # its last letter is the word's
    found = {words[word] for word, _ in examples.notes[0]}
    assert {"Le", "noyau", FIN, "\U0001f600", CAFE, "New York", "½"} <= found
    assert "" not in found


def test_windows_of_tags_hold_every_word_once(tokenizer):
    words = ["noyau", "de", "y" * 60, "le"] * 9
    rows = [{"tokens": words, "tags": ["B", "O", "O", "I"] * 9}]
    form: Tagging = form_of("token-classification", tokenizer, max_source_tokens=24)
    form.learn(table_of(rows))
    examples = form.encode(table_of(rows))
    assert [word for note in examples.notes for word, _ in note] == list(range(len(words)))
    assert max(examples.input_lengths) <= 24
    assert (examples.input_lengths == examples.target_lengths).all()
    assert (examples.targets >= 0).sum() == len(words)
    assert examples.cut == 1  # one row, whose long words lost their ends
    logits = torch.eye(3)[torch.tensor(examples.target(0)).clamp_min(0)]
    tags, least = form.predictions(logits, examples.notes[0])
    assert tags == [(word, rows[0]["tags"][word]) for word, _ in examples.notes[0]]
    assert least == pytest.approx(np.e / (np.e + 2))


def test_texts_and_targets_decode_to_what_was_written(base):
    tokenizer = load_tokenizer(base / "model")
    rows = [{"fr": {"a": "Le noyau\n\tet l'été"}, "en": "  ½ \U0001f600 </s>"}, {"fr": {"a": "mot " * 90}, "en": "fin"}]
    form = form_of("text-to-text", tokenizer, columns=Columns("fr.a", "en"), prefix="Traduis : ", max_source_tokens=20)
    examples = form.encode(table_of(rows))
    assert examples.input(0)[-1] == examples.target(0)[-1] == tokenizer.info.eos_id
    assert tokenizer.decode(examples.input(0)[:-1]) == "Traduis : Le noyau\n\tet l'été"
    assert tokenizer.decode(examples.target(0)[:-1]) == rows[0]["en"]
    assert len(examples.input(1)) == 20
    assert examples.input(1)[-1] == tokenizer.info.eos_id
    assert examples.cut == 1
    with pytest.raises(ConfigurationError, match=r"prefix: has \d+ tokens"):
        form_of("text-to-text", tokenizer, prefix="mot " * 9, max_source_tokens=8).encode(
            table_of([{"source": "a", "target": "b"}])
        )


def test_instructions_show_definition_and_examples(base):
    tokenizer = load_tokenizer(base / "model")
    row = {"definition": "Fais.", "input": "a", "output": ["b", "c"], "examples": [{"input": "x", "output": "y"}]}
    form = form_of("instructions", tokenizer)
    bare = {key: value for key, value in row.items() if key != "examples"}
    table = table_of([row, bare, bare | {"examples": None}])
    short = "Fais.\n\nInput: a Output:"
    assert form.inputs(table) == ["Fais.\n\nInput: x Output: y\n\nInput: a Output:", short, short]
    assert form.references(table) == [["b", "c"]] * 3
    assert tokenizer.decode(form.encode(table).target(0)[:-1]) == "b"


def test_worked_examples_make_room_for_the_input(base):
    tokenizer = load_tokenizer(base / "model")
    shown = [{"input": f"mot {n}", "output": "y"} for n in range(30)]
    row = {"definition": "Fais.", "input": "la fin", "output": "b", "examples": shown}
    form = form_of("instructions", tokenizer, max_source_tokens=64)
    [text] = form.inputs(table_of([row]))
    assert text.startswith("Fais.\n\nInput: mot 0 Output: y")
    assert text.endswith("Input: la fin Output:")
    kept = text.count("mot ")
    assert 0 < kept < 30
    assert len(tokenizer.encode(text)) < 64 <= len(tokenizer.encode(form.inputs(table_of([row]))[0])) + 20
    assert form.encode(table_of([row])).cut == 0


@pytest.mark.parametrize(
    ("first", "second", "kept", "cut"),
    [(3, 3, (3, 3), 0), (2, 40, (2, 28), 1), (40, 40, (14, 16), 1), (40, 2, (28, 2), 1)],
)
def test_pairs_share_the_room(plain, first, second, kept, cut):
    row = {"text": "a" * (first - 1), "text_pair": "b" * (second - 1), "label": "x"}  # and a token for the space
    form = form_of("sequence-classification", plain, columns=Columns(text_pair="text_pair"), max_source_tokens=32)
    form.label_names = ["x", "y"]
    examples = form.encode(table_of([row]))
    ids = examples.input(0).tolist()
    one = ids.index(plain.info.eos_id)
    assert ids[-1] == plain.info.eos_id
    assert (one, len(ids) - one - 2) == kept
    assert examples.cut == cut


def test_classes_are_ordered_and_weighted(plain):
    form: Classification = form_of("sequence-classification", plain, class_weights="balanced")
    rows = [{"text": "a", "label": label} for label in ["10", 9, "9", "-1", "09", 10, 10, 10]]
    form.learn(table_of(rows))
    assert form.label_names == ["-1", "09", "9", "10"]
    weights = form.weights(table_of(rows))
    assert weights == pytest.approx([2, 2, 1, 0.5])  # inverse to 1, 1, 2 and 4 examples, whose mean weight is 1
    form.config.class_weights = {"9": 3.0}
    assert form.weights(table_of(rows)) == pytest.approx([1 / 1.5, 1 / 1.5, 3 / 1.5, 1 / 1.5])
    assert form.encode(table_of(rows)).targets.tolist() == [3, 2, 2, 0, 1, 3, 3, 3]
    form.learn(table_of([{"text": "a", "label": label} for label in ("b", "--5", "a", "9", "9" * 5000, "9")]))
    assert form.label_names == ["--5", "9", "9" * 5000, "a", "b"]


def test_the_number_that_stands_for_no_target_moves_a_little(plain):
    form: Regression = form_of("regression", plain)
    targets = form.encode(table_of([{"text": "a", "label": label} for label in (-100, "-1e2", 1.5, "7", 1e15)])).targets
    assert targets.dtype == np.float32
    assert (targets != -100).all()
    np.testing.assert_allclose(targets, [-100, -100, 1.5, 7, 1e15], rtol=1e-7)
