"""scripts/french_corpus.py: every form of text it reads, languages, what is left out, and its refusals."""

import bz2
import gzip
import json
import os
import re
import shlex
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from fat5.errors import DataError
from made_packages import Files, deb, tar

ROOT = Path(__file__).parents[2]
PAGES = Path(__file__).parent / "pages"
sys.path.insert(0, str(ROOT / "scripts"))

import french_corpus  # noqa: E402
from corpora import archives, sources  # noqa: E402
from corpora.documents import Document, is_prose, read_documents  # noqa: E402
from corpora.markup import read_blocks, read_catalogue, read_descriptions, read_lyx, read_stardict, read_xml  # noqa: E402
from corpora.rows import SPLITS, split_of  # noqa: E402

LINE = "Une phrase d'assez de mots pour compter comme un paragraphe, la {}e."
PAGE = "".join(f"<p>{LINE.format(number)}</p>" for number in range(3))


def read(name: str, files: Files) -> list[Document]:
    """The documents of one package."""
    return [*read_documents({name: archives.Package(name, "1", "", files)})]


def catalogue(messages: dict[str, str], order: str = "<") -> bytes:
    """A compiled gettext catalogue, as msgfmt writes it."""
    originals, translations = [key.encode() for key in messages], [text.encode() for text in messages.values()]
    tables, body, start = [], b"", 28 + 16 * len(messages)
    for text in (*originals, *translations):
        tables.append(struct.pack(f"{order}2I", len(text), start + len(body)))
        body += text + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0)
    return head + b"".join(tables) + body


@pytest.mark.parametrize("order", ["<", ">"])
def test_messages_of_a_catalogue(order: str) -> None:
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n", "The king": "Le roi", "It’s": "C’est"}
    assert read_catalogue(catalogue(messages, order)) == [("The king", "Le roi"), ("It’s", "C’est")]
    for broken in (b"", b"abc", catalogue(messages, order)[:40], b"<html>" * 9):
        with pytest.raises(DataError, match="no gettext catalogue"):
            read_catalogue(broken)


def test_messages_become_documents_without_markup_and_variables() -> None:
    texts = {
        "one": "Le roi parla :\n\n« Nous ne céderons <i>jamais</i> un pouce de notre terre. »",
        "two": "Vous avez gagné $gold pièces d'or pour la suite de cette longue campagne.",
        "Not translated, as it is in English on both sides": "Not translated, as it is in English on both sides",
    }
    path = "./usr/share/games/wesnoth/1.16/locale/fr/LC_MESSAGES/wesnoth-x.mo"
    (document,) = read("wesnoth-1.16-data", {path: catalogue(texts)})
    assert document.paragraphs == ["Le roi parla :", "« Nous ne céderons jamais un pouce de notre terre. »"]
    assert document.name.startswith(f"{path}#")


def test_paragraphs_of_xml() -> None:
    page = b"""<page xmlns="http://projectmallard.org/1.0/"><info><credit><name>Luc</name></credit></info>
      <title>Le <app>Menu</app></title><p>Un <gui>bouton</gui>,
      puis un autre.</p><screen>ls</screen><list><item><p>Fin</p></item></list></page>"""
    assert read_xml(page) == ["Le Menu", "Un bouton, puis un autre.", "Fin"]
    docbook = (
        b"<chapter><title>A</title><para>B <emphasis>C</emphasis>.</para><programlisting>x</programlisting></chapter>"
    )
    assert read_xml(docbook) == ["A", "B C."]


def test_pages_of_a_manual_of_kde_are_documents() -> None:
    manual = f'<FILENAME filename="index.html"><html>{PAGE}</html><FILENAME filename="b.html"><html><p>Court</p></html>'
    documents = read("kile-doc", {"./usr/share/doc/HTML/fr/kile/index.cache.bz2": bz2.compress(manual.encode())})
    assert [document.name.split("#")[1] for document in documents] == ["index.html", "b.html"]
    assert [len(document.paragraphs) for document in documents] == [3, 0]


def test_paragraphs_of_lyx_are_whole_sentences() -> None:
    document = (PAGES / "titre.lyx").read_text(encoding="utf-8")
    assert read_lyx(document) == ["Un « titre »", "Le logiciel LyX est libre."]


def test_descriptions_of_packages() -> None:
    index = """Package: un
Description-md5: 0
Description-fr: premier paquet
 Ce paquet tient
 sur deux lignes.
 .
 Il contient :
  - une liste
  - sans prose
 .
 Une fin.

Package: deux
Description-md5: 0
Description-fr: second paquet
 <trans>
 .
 Traduit.
"""
    assert read_descriptions(index) == [
        ("un", ["premier paquet", "Ce paquet tient sur deux lignes.", "Une fin."]),
        ("deux", ["second paquet", "Traduit."]),
    ]


def test_entries_of_littre() -> None:
    other = "<b>1°</b> Petit du chien, et par extension de quelques autres animaux."
    entries = [(PAGES / "littre.txt").read_bytes(), other.encode()]
    body, first = b"".join(entries), len(entries[0])
    places = {"CHIEN": (0, first), "CHIEN, CHIENNE": (0, first), "CHIOT": (first, len(entries[1]))}
    index = b"".join(
        word.encode() + b"\0" + at.to_bytes(4, "big") + length.to_bytes(4, "big")
        for word, (at, length) in places.items()
    )
    documents = read("stardict-xmlittre", {"./d/XMLittre.idx": index, "./d/XMLittre.dict.dz": gzip.compress(body)})
    assert [document.paragraphs for document in documents] == [
        [
            "Chien : 1° Quadrupède domestique, le plus attaché à l'homme, gardant sa maison.",
            "Ce chien, voyant sa proie en l'eau représentée.",
            "On écrivait aussi chienet, au sens de petit chien de garde.",
        ],
        ["Chiot : 1° Petit du chien, et par extension de quelques autres animaux."],
    ]
    with pytest.raises(DataError, match="beyond its dictionary"):
        read_stardict(index, body[:10])


def test_a_page_in_latin_1_says_so() -> None:
    page = "<meta http-equiv=Content-Type content='text/html; charset=ISO-8859-1'><p>été</p>".encode("latin-1")
    assert [block.text for block in read_blocks(page)] == ["été"]
    assert [block.text for block in read_blocks(page.replace(b"ISO-8859-1", b"rot13"))] == ["\ufffdt\ufffd"]


def test_prose_is_mostly_letters() -> None:
    assert is_prose("Le chat, dit-on, dort sur le tapis ; il est 18 h 30.")
    assert is_prose("Кошка спит на ковре, как говорят.")
    assert not is_prose("0x00 0x01 0x02 --- | --- | 3.14159 -> [a] {b} 0x03 0x04")


def test_languages_are_told_by_their_commonest_words() -> None:
    lines = {
        "en": "this is a line of the manual that you can read by the fire",
        "fr": "ceci est une ligne du manuel que vous pouvez lire au coin du feu",
        "de": "dies ist eine zeile des handbuchs die man am feuer lesen kann",
        "ru": "это строка руководства которую можно читать у огня",
    }
    for language, line in lines.items():
        assert sources.is_sentence(line.split(), language)
        assert not sources.is_sentence(["hertzog", "mas", "daniel", "markstedt", "jason", "dorje", "short"], language)
        assert not sources.is_english(line.split(), language)
        assert sources.is_english(lines["en"].split(), language) == (language != "en")


@pytest.mark.parametrize(
    ("language", "path", "others"),
    [
        ("fr", "usr/share/help/fr/x/a.page", "usr/share/help/de/x/a.page"),
        ("de", "usr/share/doc/x/a.de.html", "usr/share/doc/x/a.fr.html"),
        ("ru", "usr/share/man/ru/man1/a.1.gz", "usr/share/man/fr/man1/a.1.gz"),
        ("de", "usr/share/doc/debian-handbook/html/de-DE/a.html", "usr/share/doc/debian-handbook/html/pt-BR/a.html"),
        ("ru", "usr/share/doc/HTML/ru/kile/index.cache.bz2", "usr/share/doc/HTML/de/kile/index.cache.bz2"),
        ("fr", "usr/share/games/w/fr/LC_MESSAGES/wesnoth-ei.mo", "usr/share/locale/fr/LC_MESSAGES/apt.mo"),
        ("fr", "usr/share/lyx/doc/fr/Intro.lyx", "usr/share/lyx/doc/Intro.lyx"),
    ],
)
def test_files_of_one_language_are_read(language: str, path: str, others: str) -> None:
    assert sources.wanted(language).search(f"./{path}")
    assert not sources.wanted(language).search(f"./{others}")


TEXTS = {
    "fr": "Le {n}e chapitre est celui que tout le monde voudrait lire dans les nuits d'hiver.",
    "de": "Das {n}. Kapitel ist das, was alle in den langen Nächten des Winters lesen wollen.",
    "ru": "Глава {n} — это то, что все хотят читать долгими зимними ночами, если не спится.",
}


def page(language: str, numbers: range) -> bytes:
    lines = [TEXTS[language].format(n=number) for number in numbers]
    english = "This is a line in English, and it is not for the corpus of another language, is it?"
    return "".join(f"<p>{line}</p>" for line in (*lines, english)).encode()


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """The FAQ and the handbook in three languages; the second begins with lines of the first."""
    folder = tmp_path / "packages"
    folder.mkdir()
    handbook = {f"./usr/share/doc/handbook/html/{one}-XX/a.html": page(one, range(3, 9)) for one in TEXTS}
    deb(folder, "debian-handbook", tar(handbook))
    for language in TEXTS:
        faq = {f"./usr/share/doc/faq/{language}/a.html": page(language, range(6))}
        deb(folder, f"debian-faq-{language}", tar(faq))
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for split in ("train", "validation", "test")
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.parametrize("language", TEXTS)
def test_a_corpus_is_in_one_language(language: str, packages: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "corpus"
    words = ["--packages", str(packages), "--output", str(output), "--language", language]
    assert french_corpus.main(words) == 0
    found = {row["source"]: row["text"].split("\n") for row in rows(output)}
    assert found == {
        f"debian-faq-{language}": [TEXTS[language].format(n=number) for number in range(6)],
        "debian-handbook": [TEXTS[language].format(n=number) for number in range(6, 9)],
    }
    counts = json.loads((output / "counts.json").read_text())
    assert counts["removed"]["English paragraph"] == 2
    assert counts["removed"]["repeated paragraph"] == 3
    assert [one["package"] for one in counts["sources"]] == [f"debian-faq-{language}", "debian-handbook"]
    text = "\n".join(found[f"debian-faq-{language}"])
    assert counts["by_package"][f"debian-faq-{language}"]["bytes"] == len(text.encode())
    assert f"debian-faq-{language}" in capsys.readouterr().out


def test_no_paragraph_of_a_held_out_page_is_in_training(tmp_path: Path) -> None:
    names = [f"{number:03}" for number in range(60)]
    shared = "<p id='par_1'>Ce paragraphe se trouve dans toutes les pages de l'aide, quelle que soit la page.</p>"
    files = {
        f"./usr/share/libreoffice/help/fr/text/swriter/{name}.html": (
            f"{shared}<p id='par_2'>La page {name} parle d'une chose, {'et encore ' * 9}d'une autre chose {name}.</p>"
        ).encode()
        for name in names
    }
    deb(tmp_path, "libreoffice-help-fr", tar(files))
    assert french_corpus.main(["--packages", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    texts = {split: (tmp_path / "out" / f"{split}.jsonl").read_text(encoding="utf-8") for split in SPLITS}
    assert [texts[split].count("Ce paragraphe") for split in SPLITS] == [0, 0, 1]
    splits = {split: {json.loads(line)["id"][-3:] for line in text.splitlines()} for split, text in texts.items()}
    assert all(split_of(f"swriter/{name}") == split for split in SPLITS for name in splits[split])
    assert all(splits.values())


def refused(capsys: pytest.CaptureFixture[str], output: Path, *words: object) -> str:
    assert french_corpus.main([*map(str, words), "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_refusals(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, empty = ("--packages", packages), tmp_path / "empty"
    empty.mkdir()
    assert "debian-faq-de" in refused(capsys, tmp_path / "a", *there, "--only", "debian-faq-de")
    assert "has no package aptitude-doc-fr" in refused(capsys, tmp_path / "a", *there, "--only", "aptitude-doc-fr")
    assert "has no package" in refused(capsys, tmp_path / "a", "--packages", empty)
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine").touch()
    assert "holds something already" in refused(capsys, tmp_path / "b", *there)


def test_descriptions_are_fetched_into_lists_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools, folder = tmp_path / "tools", tmp_path / "packages"
    tools.mkdir()
    folder.mkdir()
    stanza = "Package: un\\nDescription-md5: 0\\nDescription-ru: первый пакет для всех\\n Это пакет, который "
    stanza += "на самом деле ничего не делает, но он для теста нужен, и без него никак не обойтись тем, кто пишет.\\n"
    script = f"""#!/bin/sh
echo "$@" >> {tools}/called
for word in "$@"; do case "$word" in -oDir::State::Lists=*) lists="${{word#*Lists=}}";; esac; done
printf 'Origin: Debian\\nVersion: 12.9\\n' > "$lists/x_InRelease"
[ -e {tools}/NONE ] || printf '{stanza}' > "$lists/x_main_i18n_Translation-ru"
"""
    (tools / "apt-get").write_text(script)
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    words = ["--packages", str(folder), "--language", "ru", "--only", "translation-ru", "--download"]
    (tools / "NONE").touch()
    assert "no descriptions in ru came" in refused(capsys, tmp_path / "out", *words)
    (tools / "NONE").unlink()
    assert french_corpus.main([*words, "--output", str(tmp_path / "out")]) == 0
    assert [path.name for path in folder.iterdir()] == ["Translation-ru_12.9"]
    (row,) = rows(tmp_path / "out")
    assert row["id"] == "translation-ru/un"
    assert row["text"].startswith("первый пакет для всех\nЭто пакет, который")
    called = (tools / "called").read_text().splitlines()
    assert all("Acquire::Languages=ru" in line and "update" in line for line in called)
    assert len(called) == 2


def test_packages_that_another_release_lacks_are_left_out(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools, folder = tmp_path / "tools", tmp_path / "own"
    tools.mkdir()
    (tools / "apt-get").write_text(f'#!/bin/sh\n[ "$1" = download ] && cp {packages}/"$2"_* . 2>/dev/null\n')
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    words = ["--packages", str(folder), "--language", "de", "--download"]
    assert french_corpus.main([*words, "--output", str(tmp_path / "out")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out")]
    assert set(line.split(": ")[1].split(", ")) == {*sources.packages_of("de")} - {"debian-handbook", "debian-faq-de"}
    assert {path.name.split("_")[0] for path in folder.iterdir()} == {"debian-handbook", "debian-faq-de"}
    line = refused(capsys, tmp_path / "a", *words, "--only", "debian-faq-de", "maint-guide-de")
    assert "apt-get download maint-guide-de failed" in line


def test_the_commands_of_the_page_have_the_flags_of_the_script() -> None:
    page = (ROOT / "docs/french-tasks.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python scripts/french_corpus\.py .*$", page, re.MULTILINE)
    assert {"--language"} <= {word for line in lines for word in shlex.split(line)}
    for line in lines:
        parsed = french_corpus.parse(shlex.split(line, comments=True)[2:])
        assert parsed.download
