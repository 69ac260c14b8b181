"""Cleaning steps by name: each does to a document what it says, inside a real preparation."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fat5.data import load_tokenizer, open_shards, sample_path
from fat5.data.shards.prepare import PrepareConfig, prepare
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer
from fat5.errors import DataError

pytest.importorskip("datatrove")

from fat5.data.text import cleaning
from fat5.data.text.cleaning import UnicodeWords

SENTENCE = "Le service redémarre chaque nuit après la mise à jour des paquets installés."
GOOD = " ".join(f"Phrase {index} : {SENTENCE}" for index in ("un", "deux", "trois", "quatre", "cinq", "six"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("cleaning") / "tokenizer"
    train_tokenizer(TokenizerTraining([str(sample_path("fr"))], str(output), vocab_size=1024, rows=200))
    return str(output)


def prepared(folder: Path, tokenizer: str, rows: list[dict[str, str]], steps: list[str]) -> list[str]:
    """What is left of the rows after the steps."""
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare(
        PrepareConfig(
            [f"{folder}/a.jsonl"], tokenizer, f"{folder}/out", steps=steps, validation_fraction=0.0, workers=1
        )
    )
    loaded = load_tokenizer(folder / "out" / "tokenizer")
    return [loaded.decode(document) for document in open_shards(folder / "out")]


def test_pii_replaces_addresses(tmp_path: Path, tokenizer: str) -> None:
    found = prepared(
        tmp_path, tokenizer, [{"text": "Écrire à jean.dupont@exemple.fr ou 8.8.8.8, pas 10.0.0.1."}], ["pii"]
    )
    assert "dupont" not in found[0]
    assert "8.8.8.8" not in found[0]
    assert found[0].startswith("Écrire à email@example.com ou ")
    assert found[0].endswith(", pas 10.0.0.1.")


def test_c4_drops_short_pages_and_lines_without_an_end(tmp_path: Path, tokenizer: str) -> None:
    rows = [{"text": f"Menu\n{GOOD}"}, {"text": SENTENCE}, {"text": f"{GOOD} lorem ipsum."}]
    assert prepared(tmp_path, tokenizer, rows, ["c4"]) == [GOOD]


def test_gopher_drops_by_quality_and_repetition(tmp_path: Path, tokenizer: str) -> None:
    varied = sample_paragraphs(1)[0]
    symbols = "# " * 200
    repeated = "\n".join([SENTENCE] * 20)
    rows = [{"text": varied}, {"text": symbols}, {"text": "trop court"}, {"text": repeated}]
    assert prepared(tmp_path, tokenizer, rows, ["gopher_quality", "gopher_repetition"]) == [varied]
    (tmp_path / "one").mkdir()
    assert repeated in prepared(tmp_path / "one", tokenizer, rows, ["gopher_quality"])


@pytest.mark.slow
def test_urls_drop_by_blocklist(tmp_path: Path, tokenizer: str) -> None:
    for package in ("ahocorasick", "tldextract"):
        pytest.importorskip(package, reason="waits on datatrove[processing]")
    rows = [
        {"text": "bon", "url": "https://www.debian.org/doc/"},
        {"text": "mauvais", "url": "http://xxx-porn-videos.example.com/"},
    ]
    assert prepared(tmp_path, tokenizer, rows, ["urls"]) == ["bon"]


def test_urls_need_their_column(tmp_path: Path, tokenizer: str) -> None:
    for package in ("ahocorasick", "tldextract"):
        pytest.importorskip(package, reason="waits on datatrove[processing]")
    with pytest.raises(DataError, match="no column 'url'"):
        prepared(tmp_path, tokenizer, [{"text": "sans adresse"}], ["urls"])
    assert not (tmp_path / "out").exists()


def test_minhash_keeps_one_of_near_duplicates_across_tasks(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fat5.data.text.corpus.SMALLEST_CHUNK", 4_000)
    texts = sample_paragraphs(20)
    near = [text.replace("Debian", "debian").replace(",", "") for text in texts[:5]]
    rows = [{"text": text} for text in [*texts, *texts[:3], *near]]
    found = prepared(tmp_path, tokenizer, rows, ["minhash"])
    assert len(found) == len(texts)
    assert {text.lower().replace(",", "") for text in found} == {text.lower().replace(",", "") for text in texts}
    assert not (tmp_path / "out" / "logs" / "minhash").exists()


@pytest.mark.slow
def test_minhash_in_processes_gives_the_same_manifest(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fat5.data.text.corpus.SMALLEST_CHUNK", 8_000)
    texts = sample_paragraphs(20)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *texts]))
    keys = PrepareConfig([f"{tmp_path}/a.jsonl"], tokenizer, f"{tmp_path}/one", steps=["minhash"], workers=1)
    assert prepare(keys) == prepare(replace(keys, output_dir=f"{tmp_path}/two", workers=2))


class _ByStopWords:
    """Answers as fastText's model does (labels, scores), from three words a language."""

    def predict(self, text: str, k: int) -> tuple[tuple[str, str], np.ndarray]:
        words = text.lower().split()
        counts = [sum(words.count(word) for word in known) for known in (("le", "la", "les"), ("the", "of", "and"))]
        return ("__label__fr", "__label__en"), np.array(counts) / max(1, sum(counts))


def test_language_keeps_what_the_model_says(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself comes from the network; one of the same form stands in for it."""
    pytest.importorskip("fasttext", reason="waits on datatrove[processing]")
    monkeypatch.setattr("datatrove.utils.lid.FT176LID.model", _ByStopWords())
    cleaning._language_filter.cache_clear()
    french, english = sample_paragraphs(5, "fr")[1], sample_paragraphs(5, "en")[1]
    rows = [{"text": french}, {"text": english}, {"text": "?"}]
    assert prepared(tmp_path, tokenizer, rows, ["language=fr"]) == [french]
    (tmp_path / "both").mkdir()
    assert prepared(tmp_path / "both", tokenizer, rows, ["language=fr+en"]) == [french, english]


def test_a_model_that_cannot_be_fetched_is_found_first(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    pytest.importorskip("fasttext", reason="waits on datatrove[processing]")
    monkeypatch.setattr("datatrove.utils.lid.cached_asset_path_or_download", offline)
    cleaning._language_filter.cache_clear()
    with pytest.raises(DataError, match=r"language=fr: the language identification model cannot be fetched \(no route"):
        prepared(tmp_path, tokenizer, [{"text": "a"}], ["language=fr"])
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_found_first(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ImportError("Please install `ahocorasick`")

    monkeypatch.setattr(cleaning, "_url_blocklists", missing)
    with pytest.raises(DataError, match=r"step urls: packages are missing.*datatrove\[processing\]"):
        prepared(tmp_path, tokenizer, [{"text": "a", "url": "b"}], ["urls"])
    assert not (tmp_path / "out").exists()


def test_words_and_sentences_of_any_language() -> None:
    words = UnicodeWords()
    assert words.word_tokenize("L'été, 日本 !") == ["L", "'", "été", ",", "日本", "!"]
    assert words.sent_tokenize("Un. Deux !\nTrois 3.5 fois…") == ["Un.", "Deux !", "Trois 3.5 fois…"]
    text = "Un. Deux."
    assert [text[start:end].strip() for start, end in words.span_tokenize(text)] == ["Un.", "Deux."]


def sample_paragraphs(count: int, language: str = "fr", shortest: int = 700) -> list[str]:
    """The first long paragraphs of the sample."""
    with gzip.open(sample_path(language), "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [text for text in texts if len(text) >= shortest][:count]
