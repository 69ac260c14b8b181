"""The sample corpus: what is committed, and that the script makes it from HTML."""

import gzip
import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from fat5.data import sample_path
from fat5.errors import DataError

ROOT = Path(__file__).parents[2]
# Paragraphs and characters of the committed files; French is two thirds of the book, the rest is not translated.
COMMITTED = {"fr": (1923, 609_759), "en": (3032, 941_830), "de": (2341, 796_988)}

PAGE = """<html><head><link rel="up" href="{up}.html" /></head><body>
<div class="section"><h2>Title</h2><div class="para">{one}</div>
<pre class="screen">$ ls</pre>
<div class="para">{two} <code>ls</code><ul><li><div class="para">{three}</div></li></ul></div>
<div class="para">{four} <a class="xref" href="x.html">{link}</a>.</div><div class="para">...</div></div>
</body></html>"""
ENGLISH = {"one": "A first\n  paragraph.", "two": "Run", "three": "an item", "four": "See section", "link": "Apt tools"}
FRENCH = {
    "one": "Un premier\n  paragraphe.",
    "two": "Lancez",
    "three": "un élément",
    "four": "See section",
    "link": "APT",
}


@cache
def rows(language: str) -> list[dict[str, str]]:
    with gzip.open(sample_path(language), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("extract_handbook", ROOT / "scripts" / "extract_handbook.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def handbook(tmp_path: Path) -> Path:
    for language, words in (("en-US", ENGLISH), ("fr-FR", FRENCH)):
        folder = tmp_path / "html" / language
        folder.mkdir(parents=True)
        (folder / "apt.html").write_text(PAGE.format(up="index", **words), encoding="utf-8")
        (folder / "sect.get.html").write_text(PAGE.format(up="apt", **words), encoding="utf-8")
    return tmp_path / "html"


@pytest.mark.parametrize("language", COMMITTED)
def test_counts(language: str) -> None:
    assert (len(rows(language)), sum(len(row["text"]) for row in rows(language))) == COMMITTED[language]
    assert len({row["id"] for row in rows(language)}) == len(rows(language))
    assert all(row["text"].strip() == row["text"] != "" and "  " not in row["text"] for row in rows(language))


@pytest.mark.parametrize("language", ["fr", "de"])
def test_languages_align_by_id_and_share_chapters(language: str) -> None:
    english = {row["id"]: row for row in rows("en")}
    for row in rows(language):
        assert english[row["id"]]["chapter"] == row["chapter"]
    ratios = sorted(len(row["text"]) / len(english[row["id"]]["text"]) for row in rows(language))
    # A translation is about as long as its source; shifted paragraphs would scatter these ratios.
    assert 0.6 < ratios[len(ratios) // 20]
    assert ratios[-len(ratios) // 20] < 2.2


@pytest.mark.parametrize("language", ["fr", "de"])
def test_no_untranslated_paragraph(language: str) -> None:
    english = {row["id"]: row["text"] for row in rows("en")}
    common = {"the", "of", "and", "is", "are", "with", "this", "that", "which", "be", "will"}
    for row in rows(language):
        assert row["text"] != english[row["id"]]
        words = row["text"].lower().split()
        assert sum(word in common for word in words) <= max(2, 0.15 * len(words)), row


def test_attribution_and_licence_lie_beside_it() -> None:
    folder = sample_path("fr").parent
    assert "Hertzog" in (folder / "README.md").read_text(encoding="utf-8")
    assert "CC-BY-SA-3.0" in (folder / "COPYRIGHT").read_text(encoding="utf-8")


def test_unknown_language_is_refused() -> None:
    with pytest.raises(DataError, match="fr, en, de"):
        sample_path("xx")


def test_script_extracts_aligns_and_drops(handbook: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert script().main([str(handbook), str(out), "--languages", "en-US", "fr-FR"]) == 0
    with gzip.open(out / "fr.jsonl.gz", "rt", encoding="utf-8") as file:
        french = [json.loads(line) for line in file]
    assert french[:3] == [
        {"id": "apt/000", "chapter": "apt", "text": "Un premier paragraphe."},
        {"id": "apt/001", "chapter": "apt", "text": "Lancez ls"},
        {"id": "apt/002", "chapter": "apt", "text": "un élément"},
    ]
    # The fourth is English but for its cross-reference, the fifth has no letters.
    assert [row["id"] for row in french[3:]] == ["sect.get/000", "sect.get/001", "sect.get/002"]
    assert {row["chapter"] for row in french} == {"apt"}


def test_script_gives_the_same_bytes_twice(handbook: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        script().main([str(handbook), str(tmp_path / name), "--languages", "en-US"])
    assert (tmp_path / "a" / "en.jsonl.gz").read_bytes() == (tmp_path / "b" / "en.jsonl.gz").read_bytes()


def test_script_refuses_pages_that_do_not_align(handbook: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = handbook / "fr-FR" / "apt.html"
    page.write_text(page.read_text(encoding="utf-8").replace('class="para"', 'class="note"', 1), encoding="utf-8")
    assert script().main([str(handbook), str(tmp_path / "out"), "--languages", "fr-FR"]) == 2
    assert "apt has 4 paragraphs, but 5 in English" in capsys.readouterr().err
