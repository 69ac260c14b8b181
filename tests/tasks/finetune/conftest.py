"""A pretrained run small enough for a test, and examples of every task on the sample's text."""

import gzip
import json
import re

import pytest

from fat5.data import sample_path
from fat5.tasks import pretrain
from made_run import prepare_sample, tiny


@pytest.fixture
def drawn():
    """The test looks at drawings."""


@pytest.fixture(autouse=True)
def _no_drawing(request, monkeypatch):
    """The measured peak of the machine and, where no test looks at it, the drawing only cost here."""
    monkeypatch.setattr("fat5.train.trainer.peak_flops", lambda *arguments: 1e12)
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("fat5.train.run.draw_run", lambda *arguments: None)


def read_sample(language):
    rows = gzip.decompress(sample_path(language).read_bytes()).decode().splitlines()
    return {row["id"]: row for row in map(json.loads, rows)}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a pretrained run: width 32, a vocabulary of 1,024."""
    folder = tmp_path_factory.mktemp("base")
    pretrain(tiny(prepare_sample(folder), folder / "run"))
    return folder / "run"


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Task → a file of 120 examples."""
    folder = tmp_path_factory.mktemp("tasks")
    french, english = read_sample("fr"), read_sample("en")
    shared = [key for key in french if key in english][:120]
    rows = [
        {
            "translation": {"fr": french[key]["text"][:200], "en": english[key]["text"][:200]},
            "chapter": key.split("/")[0],
        }
        for key in shared
    ]
    texts = [row["translation"]["fr"] for row in rows]
    words = [text.split()[:30] for text in texts]
    found = [(text, re.search(r"\w{4,}", text)) for text in texts]
    tables = {
        "text-to-text": rows,
        "instructions": [
            {
                "definition": "Traduis.",
                "input": row["translation"]["fr"][:60],
                "output": [row["translation"]["en"][:60]],
            }
            for row in rows
        ],
        "sequence-classification": [
            {"text": text, "label": key.split("/")[0]} for text, key in zip(texts, shared, strict=True)
        ],
        "regression": [{"text": text, "label": len(text) / 100} for text in texts],
        "token-classification": [
            {"tokens": some, "tags": ["B-UP" if word[0].isupper() else "O" for word in some]} for some in words
        ],
        "question-answering": [
            {"question": "Quel mot ?", "context": text, "answers": {"text": [m.group()], "answer_start": [m.start()]}}
            for text, m in found
            if m
        ],
    }
    return {task: write(folder / f"{task}.jsonl", rows) for task, rows in tables.items()}
