"""What preparing needs, in whatever process it runs: a tokenizer, texts, small tasks."""

import gzip
import json

import pytest

from fat5.data import sample_path
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("prepare") / "tokenizer"
    train_tokenizer(TokenizerTraining([str(sample_path("fr"))], str(output), vocab_size=2048, rows=500))
    return str(output)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with gzip.open(sample_path("fr"), "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file][:400]


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of 16 kB, so that a small corpus has many."""
    monkeypatch.setattr("fat5.data.text.corpus.SMALLEST_CHUNK", 16_000)
