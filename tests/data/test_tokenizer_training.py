"""Training on text without spaces: bounded work, said in a line, and a tokenizer that is of use."""

import json
from pathlib import Path

import numpy as np
import pytest

from fat5.data import load_tokenizer
from fat5.data.tokenizer import training as tokenizer_training
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer

PAGES = 12
LETTERS = {
    "chinese": [chr(0x4E00 + index) for index in range(300)],
    # A consonant with or without a vowel mark: marks are no letters to Python's \w.
    "thai": [chr(0x0E01 + index) + mark for index in range(40) for mark in ("", "\u0e34", "\u0e38", "\u0e35\u0e48")],
}


@pytest.fixture(scope="module", params=[pytest.param("chinese", marks=pytest.mark.slow), "thai"])
def spaceless(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Pages of 4,000 characters without a space or a full stop, written with 500 words of one to three letters."""
    rng = np.random.default_rng(0)
    letters = LETTERS[request.param]
    sizes = rng.integers(1, 4, 500)
    words = ["".join(letters[letter % len(letters)] for letter in rng.zipf(1.3, size)) for size in sizes]
    pages = ["".join(words[index] for index in rng.zipf(1.2, 2000) % 500)[:4000] for _ in range(PAGES)]
    path = tmp_path_factory.mktemp("spaceless") / "pages.jsonl"
    path.write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    return path, pages


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_text_without_spaces_is_learned_from(spaceless, tmp_path: Path, capfd, model: str) -> None:
    path, pages = spaceless
    report = train_tokenizer(TokenizerTraining([str(path)], str(tmp_path / "t"), model=model, vocab_size=1536))
    tokenizer = load_tokenizer(tmp_path / "t")
    assert report["learned_documents"] == PAGES
    ids, lengths = tokenizer.encode_documents(pages[:3])
    assert tokenizer.decode(ids[: lengths[0]].tolist()) == pages[0]
    assert len(ids) < 0.7 * sum(map(len, pages[:3])), "a token is a word of two characters on average"
    assert report["byte_fallback_rate"] < 0.01
    assert (f"learning from {PAGES} documents" in capfd.readouterr().err) == (model == "unigram")


def test_unigram_learns_from_a_bounded_text(spaceless, tmp_path: Path, capfd, monkeypatch) -> None:
    path, _ = spaceless
    monkeypatch.setattr(tokenizer_training, "UNIGRAM_CHARACTERS", 10_000)
    config = TokenizerTraining([str(path)], str(tmp_path / "t"), model="unigram", vocab_size=1024)
    report = train_tokenizer(config)
    assert 3 <= report["learned_documents"] <= 4
    assert "the most that Unigram takes" in capfd.readouterr().err
    assert json.loads((tmp_path / "t" / "training.json").read_text())["report"] == report
