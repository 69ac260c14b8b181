"""`fat5 finetune` on input that it cannot use: one line that says what, where and what to do, code 2, nothing left."""

import json
import shutil
import sys

import pytest

from fat5 import model as fat5_model
from fat5.cli import parsing
from fat5.cli.main import main
from fat5.model import FAT5Config
from fat5.tasks.finetune.config import TaskData
from made_tokenizers import sentencepiece

PARSE = parsing.parse
COUNT, BAD = 30, 3
HELD = ["--data.validation_fraction", "0.3"]
CHANGES = {
    "text-to-text": lambda n: {"source": f"le noyau {'a' * n}", "target": "un paquet"},
    "instructions": lambda n: {"definition": "le noyau", "input": "a" * (n + 1), "output": ["de"]},
    "sequence-classification": lambda n: {"text": f"le noyau {'a' * n}", "label": "ab"[n % 2]},
    "regression": lambda n: {"text": f"le noyau {'a' * n}", "label": n / 3},
    "token-classification": lambda n: {"tokens": ["le", "noyau" + "a" * n], "tags": ["O", "B-X"]},
    "question-answering": lambda n: {
        "question": "pour", "context": f"le noyau {'a' * n}", "answers": {"text": ["noyau"], "answer_start": [3]},
    },
}  # fmt: skip
TEXT, INSTRUCT, CLASSES, NUMBERS, TAGS, ANSWERS = CHANGES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of models with random weights and a tokenizer: whole/, head/ (a classifier of 3 labels), adapter/."""
    folder = tmp_path_factory.mktemp("models")
    for name, cls in (("whole", "FAT5ForConditionalGeneration"), ("head", "FAT5ForSequenceClassification")):
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
        config = FAT5Config(vocab_size=128, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **sizes)
        config.num_labels = 3
        getattr(fat5_model, cls)(config).save_pretrained(folder / name)
        sentencepiece(folder / name)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def refused(models, tmp_path, capsys, monkeypatch):
    """Runs the verb on a file of rows, of which one may be changed; returns the one line that it prints."""

    def run(task, *keys, change=None, rows=None, file="a.jsonl", content=None, model="whole"):
        rows = [CHANGES[task](n) for n in range(COUNT)] if rows is None else rows
        if change is not None:
            rows[BAD] = {key: value for key, value in (rows[BAD] | change).items() if value is not ...}
        path = tmp_path / file
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) if content is None else content)
        out = tmp_path / "new" / "run"
        if keys == tuple(HELD):  # reading the command line takes most of the time
            data = TaskData([str(path)], validation_fraction=float(HELD[1]))
            given = {"output_dir": str(out), "model": str(models / model), "task": task, "data": data}
            monkeypatch.setattr(parsing, "parse", lambda *_: given)
        keys = ["--model", str(models / model), "--task", task, "--data.train", str(path), *keys]
        code = main(["finetune", "--output_dir", str(out), *keys])
        monkeypatch.setattr(parsing, "parse", PARSE)
        said = capsys.readouterr()
        assert (code, said.out) == (2, ""), said
        line = said.err.removesuffix("\n")
        assert "\n" not in line
        assert not (tmp_path / "new").exists()
        return line.replace(str(tmp_path), "").replace(str(models), "")

    return run


ROWS = {
    "wrong column": (
        TEXT,
        {"target": ..., "targets": "a"},
        "no column 'target'; it has source, targets. Did you mean targets",
    ),
    "nested": (TEXT, {"target": {"fr": "a"}}, "column 'target' is nested. Name one of target.fr"),
    "empty target": (TEXT, {"target": " \n"}, "column 'target' is empty"),
    "null target": (TEXT, {"target": None}, "column 'target' is empty"),
    "number": (TEXT, {"source": 5}, "column 'source' holds 5, no text"),
    "examples": (INSTRUCT, {"examples": 5}, "column 'examples' holds 5. Give a list of {input: text, output: text}"),
    "example": (INSTRUCT, {"examples": [{"input": "a"}]}, "Give a list of {input: text, output: text}"),
    "no output": (INSTRUCT, {"output": []}, "column 'output' holds []"),
    "empty output": (INSTRUCT, {"output": ["a", ""]}, "column 'output' holds ['a', '']"),
    "float label": (
        CLASSES,
        {"label": 0.5},
        "holds 0.5. A label is a name or a whole number; other numbers are --task regression",
    ),
    "nan label": (CLASSES, {"label": float("nan")}, "column 'label' holds nan"),
    "bool label": (CLASSES, {"label": True}, "column 'label' holds True"),
    "blank label": (CLASSES, {"label": " "}, "column 'label' holds ' '"),
    "empty text": (CLASSES, {"text": ""}, "column 'text' is empty"),
    "huge": (NUMBERS, {"label": 1e300}, "column 'label' holds 1e+300. Regression needs a number of at most 1e+15"),
    "huger": (NUMBERS, {"label": 10**400}, "Regression needs a number"),
    "word": (NUMBERS, {"label": "abc"}, "column 'label' holds 'abc'"),
    "bool": (NUMBERS, {"label": True}, "column 'label' holds True"),
    "infinite": (NUMBERS, {"label": "inf"}, "column 'label' holds 'inf'"),
    "tags": (TAGS, {"tags": ["O"]}, "2 tokens and 1 tags"),
    "tag string": (TAGS, {"tags": "O O"}, "column 'tags' holds 'O O'. Give a list of words (tokens) and one of tags"),
    "null tag": (TAGS, {"tags": ["O", None]}, "column 'tags' holds ['O', None]"),
    "no words": (TAGS, {"tokens": [], "tags": []}, "column 'tokens' holds []"),
    "empty words": (TAGS, {"tokens": ["", ""]}, "the tokens encode to none of the model's"),
    "elsewhere": (
        ANSWERS,
        {"answers": {"text": ["noyau"], "answer_start": [4]}},
        "the answer 'noyau' does not stand at character 4 of the context. It stands at 3",
    ),
    "negative": (ANSWERS, {"answers": {"text": ["a"], "answer_start": [-1]}}, "does not stand at character -1"),
    "outside": (
        ANSWERS,
        {"answers": {"text": ["zzz"], "answer_start": [99]}},
        "An answer is a text of the context, letter for letter",
    ),
    "blank": (ANSWERS, {"answers": {"text": [" "], "answer_start": [2]}}, "does not stand at character 2"),
    "one start": (
        ANSWERS,
        {"answers": {"text": ["le", "le"], "answer_start": [0]}},
        "Give {text: [...], answer_start: [...]}",
    ),
    "null": (ANSWERS, {"answers": None}, "column 'answers' holds None"),
    "a list": (ANSWERS, {"answers": [{"text": "le", "answer_start": 0}]}, "Give {text: [...], answer_start: [...]}"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_named(refused, name):
    task, change, message = ROWS[name]
    line = refused(task, *HELD, change=change)
    assert line.startswith(f"fat5 finetune: /a.jsonl, row {BAD + 1}: ")
    assert message in line


KEYS = {
    "column": (
        TEXT,
        ["--data.columns.source", "Sources"],
        "no column 'Sources'; it has source, target. Did you mean source?",
    ),
    "too long": (
        TEXT,
        ["--data.too_long", "refuse", "--data.max_target_tokens", "2"],
        "the target has more than 2 tokens (the first of",
    ),
    "prefix": (TEXT, ["--data.prefix", "le " * 20, "--data.max_source_tokens", "16"], "prefix: has 2"),
    "no room": (CLASSES, ["--data.max_source_tokens", "2"], "data.max_source_tokens: must be a whole number from 8"),
    "small pack": (
        CLASSES,
        ["--data.encoder_tokens", "128", "--data.prefix", "a" * 150],
        "a pack of 128 tokens has no room for the longest example",
    ),
    "pair": (
        CLASSES,
        ["--data.columns.text_pair", "texts"],
        "no column 'texts'; it has text, label. Did you mean text?",
    ),
    "weights": (
        CLASSES,
        ["--class_weights", '{"a": 1.0, "c": 2.0}'],
        "class_weights: label 'c' is not one that the model learned, which are a, b",
    ),
    "negative weight": (CLASSES, ["--class_weights", '{"a": -1.0}'], "class_weights: a has weight -1.0"),
    "number weight": (CLASSES, ["--class_weights", "{0: 2.0}"], "class_weights: label '0' is not one"),
    "all weights": (NUMBERS, ["--class_weights", "balanced"], "class_weights is set, and regression has no classes"),
    "smoothing": (
        ANSWERS,
        ["--label_smoothing", "0.1"],
        "label_smoothing is 0.1, and question-answering has no classes",
    ),
    "tag prefix": (TAGS, ["--data.prefix", "a"], "data.prefix is set, and token-classification has no place for it"),
    "head": (TAGS, ["--head", "encoder-decoder"], "head is encoder-decoder, and token-classification has no such head"),
    "long word": (
        TAGS,
        ["--data.too_long", "refuse", "--data.max_source_tokens", "9"],
        "the source has more than 8 tokens",
    ),
    "stride": (
        ANSWERS,
        ["--data.stride", "64", "--data.max_source_tokens", "64"],
        "data.stride is 64, and an input has 64 tokens",
    ),
    "question": (
        ANSWERS,
        ["--data.stride", "7", "--data.max_source_tokens", "8"],
        "the question has 1 tokens and leaves 5 for the context",
    ),
    "no held": (TEXT, ["--data.validation_fraction", "0"], "leaves validation empty. Give --data.validation FILE"),
    "limit": (TEXT, ["--data.max_examples", "0"], "data.max_examples: must be a whole number from 1"),
    "one": (TEXT, ["--data.max_examples", "1"], "1 examples with 1 different inputs leaves"),
    "metric": (TEXT, ["--metric", "blue"], "metric is 'blue'. Did you mean bleu?"),
    "other metric": (
        CLASSES,
        ["--metric", "bleu"],
        "metric is 'bleu'. sequence-classification has loss, accuracy, macro_f1, matthews",
    ),
    "layers": (TEXT, ["--lora.rank", "2", "--lora.targets", "[query]"], "lora.targets: no layer is called query"),
    "seeds": (
        TEXT,
        ["--seeds", "2", "--lora.rank", "2", "--lora.targets", "[query]"],
        "lora.targets: no layer is called query",
    ),
    "absent": (TEXT, ["--data.validation", "absent.jsonl"], "absent.jsonl: no such file or folder"),
    "hub": (TEXT, ["--data.validation", "hf:absent"], "hf:absent: split validation of this dataset cannot be opened"),
    "pickle": (TEXT, ["--data.validation", "absent.pkl"], "absent.pkl: no such file or folder"),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_does_not_fit_is_named(refused, name):
    task, keys, message = KEYS[name]
    assert message in refused(task, *HELD, *keys)


def test_labels_that_cannot_be_learned(refused, tmp_path):
    text = CHANGES[CLASSES]
    one = refused(CLASSES, *HELD, rows=[text(n) | {"label": "a"} for n in range(COUNT)])
    assert "column 'label' has 1 different labels" in one
    own = refused(CLASSES, *HELD, rows=[text(n) | {"label": f"label-{n}"} for n in range(COUNT)])
    assert "is not one that the model learned, which are label-" in own
    valid = tmp_path / "valid.jsonl"
    valid.write_text('{"text": "le", "label": 1}\n')
    rows = [{"text": "a", "label": n} for n in range(100_000)]
    many = refused(CLASSES, "--data.validation", str(valid), rows=rows)
    assert "column 'label' has 100,000 different labels" in many
    assert "65,536 is the most" in many
    only = refused(TAGS, *HELD, rows=[CHANGES[TAGS](n) | {"tags": ["O", "O"]} for n in range(COUNT)])
    assert "column 'tags' has 1 different tags" in only
    for split in ("validation", "test"):
        other = tmp_path / "other.jsonl"
        other.write_text('{"text": "le", "label": "bb"}\n')
        unseen = refused(CLASSES, *HELD, f"--data.{split}", str(other))
        assert unseen.startswith("fat5 finetune: /other.jsonl, row 1: label 'bb' is not one that the model learned")
        assert "Did you mean 'b'?" in unseen


def test_a_file_of_other_columns_is_named(refused, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("src,target\na,b\n")
    line = refused(TEXT, *HELD, "--data.train+", str(other))
    assert line.startswith("fat5 finetune: /other.csv, row 1: no column 'source'; it has src, target")


def test_a_damaged_file_and_a_bad_row_of_csv_are_named(refused):
    assert "/a.jsonl:2: not JSON" in refused(TEXT, content='{"source": "a", "target": "b"}\n{')
    assert "/a.csv:3: fields in this row: 3" in refused(TEXT, file="a.csv", content="source,target\na,b\na,b,c\n")
    assert "column 'tokens' holds 'a b'" in refused(TAGS, file="a.csv", content="tokens,tags\na b,O O\n")


def test_a_model_that_does_not_fit_the_task(refused):
    assert "has no decoder, which text-to-text needs" in refused(TEXT, *HELD, model="head")
    assert "its head gives 3 numbers, and these examples need 2" in refused(CLASSES, *HELD, model="head")
    assert "which head encoder-decoder needs" in refused(CLASSES, *HELD, "--head", "encoder-decoder", model="head")
    assert "holds an adapter of PEFT, which needs its base model" in refused(TEXT, model="adapter")
    assert "holds no model and no checkpoint" in refused(TEXT, model="absent")


@pytest.mark.parametrize(
    ("task", "module", "message"),
    [
        (
            TEXT,
            "rouge_score.rouge_scorer",
            "needs the rouge-score package, which is not installed. pip install 'fat5[eval]'",
        ),
        (TEXT, "sacrebleu", "needs the sacrebleu package, which is not installed. pip install 'fat5[eval]'"),
        (
            CLASSES,
            "sklearn.metrics",
            "needs the scikit-learn package, which is not installed. pip install 'fat5[eval]'",
        ),
        (TEXT, "peft", "low-rank adaptation needs the package peft. pip install 'fat5[lora]'"),
    ],
    ids=["rouge", "sacrebleu", "sklearn", "peft"],
)
def test_a_missing_library_is_named_with_its_extra(refused, monkeypatch, task, module, message):
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, module, None)
    assert message in refused(task, *HELD, "--lora.rank", "2")


def test_a_folder_with_other_content_stays(refused, models, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(CHANGES[TEXT](n)) + "\n" for n in range(COUNT)))
    keys = ["--model", str(models / "whole"), "--data.train", str(tmp_path / "a.jsonl"), *HELD]
    assert main(["finetune", "--output_dir", str(tmp_path / "mine"), *keys]) == 2
    assert "holds something that is not a FAT5 run (notes.txt)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    shutil.rmtree(tmp_path / "mine")
