"""Extracts aligned paragraphs from the HTML of Debian's package `debian-handbook` into the sample corpus.

    apt-get download debian-handbook
    dpkg -x debian-handbook_*.deb handbook
    python scripts/extract_handbook.py handbook/usr/share/doc/debian-handbook/html src/fat5/data/sample

Each language becomes `LL.jsonl.gz`, one paragraph a line: `id` (page and position on it, the same in every
language), `chapter` (slug of the chapter the page belongs to) and `text`. Code listings are skipped, and so are
paragraphs that a translation left in English. The output depends on the input alone: same HTML, same bytes.
"""

import argparse
import gzip
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

ENGLISH = "en-US"
VOID = {"br", "hr", "img", "input", "link", "meta", "col"}
BLOCKS = {"div", "pre", "ul", "ol", "dl", "table", "li", "dd", "dt", "p", "td", "th", "tr"}
SKIPPED = {"pre", "script", "style"}
# A paragraph that shares this part of its words with the English one was only touched up, not translated.
SAME_WORDS = 0.6


@dataclass
class Paragraph:
    """One `div.para`: its text, and its text without cross-references, which are translated even where it is not."""

    text: str = ""
    text_without_references: str = ""


@dataclass
class Page:
    """One HTML page: what it hangs under (`<link rel="up">`) and its paragraphs in document order."""

    up: str | None = None
    paragraphs: list[Paragraph] = field(default_factory=list)


class _PageParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()
        self._open: list[tuple[str, str, Paragraph | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "link" and given.get("rel") == "up":
            self.page.up = Path(given["href"]).stem
        if tag in VOID:
            self._add(" " if tag in ("br", "hr") else "")
            return
        classes = given.get("class", "").split()
        paragraph = None
        if tag in BLOCKS:
            self._add(" ")
        if tag == "div" and "para" in classes:
            paragraph = Paragraph()
            self.page.paragraphs.append(paragraph)
        block = tag in BLOCKS or tag in SKIPPED
        kind = "block" if block else "reference" if "xref" in classes else "inline"
        self._open.append((tag, kind, paragraph))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        for position in range(len(self._open) - 1, -1, -1):
            if self._open[position][0] == tag:
                del self._open[position:]
                return

    def handle_data(self, data: str) -> None:
        self._add(data)

    def _add(self, data: str) -> None:
        reference = False
        for _tag, kind, paragraph in reversed(self._open):
            if paragraph is not None:
                paragraph.text += data
                paragraph.text_without_references += "" if reference else data
                return
            if kind == "block":
                return
            reference = reference or kind == "reference"


def read_page(html: str) -> Page:
    """Parses one page; white space is collapsed as a browser does, no-break spaces are kept."""
    parser = _PageParser()
    parser.feed(html)
    parser.close()
    for paragraph in parser.page.paragraphs:
        paragraph.text = _collapse(paragraph.text)
        paragraph.text_without_references = _collapse(paragraph.text_without_references)
    return parser.page


def _collapse(text: str) -> str:
    return re.sub(r"[ \t\r\n]+", " ", text).strip(" ")


def read_language(folder: Path) -> dict[str, Page]:
    """Page slug → page, for every HTML page of one language."""
    return {path.stem: read_page(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.html"))}


def chapter_of(slug: str, pages: dict[str, Page]) -> str:
    """The page just below `index` that `slug` hangs under, followed through `<link rel="up">`."""
    seen = {slug}
    while (up := pages[slug].up) not in (None, "index") and up in pages and up not in seen:
        slug = up
        seen.add(slug)
    return slug


def extract(pages: dict[str, Page], english: dict[str, Page], translated: bool) -> list[dict[str, str]]:
    """Rows of one language. Positions count every paragraph of the page, kept or not, so languages align by `id`.

    Raises:
        ValueError: a page has another number of paragraphs than in English, so positions would not align.
    """
    rows = []
    for slug, page in pages.items():
        original = english.get(slug, Page())
        if len(original.paragraphs) != len(page.paragraphs):
            raise ValueError(
                f"page {slug} has {len(page.paragraphs)} paragraphs, but {len(original.paragraphs)} in English"
            )
        chapter = chapter_of(slug, english)
        for position, (paragraph, source) in enumerate(zip(page.paragraphs, original.paragraphs, strict=True)):
            if not any(character.isalpha() for character in paragraph.text):
                continue
            if translated and untranslated(paragraph, source):
                continue
            rows.append({"id": f"{slug}/{position:03d}", "chapter": chapter, "text": paragraph.text})
    return rows


def untranslated(paragraph: Paragraph, source: Paragraph) -> bool:
    """Whether a paragraph is still the English one: equal but for its cross-references, or most of its words."""
    if paragraph.text_without_references == source.text_without_references:
        return True
    words, source_words = Counter(paragraph.text.split()), Counter(source.text.split())
    return sum((words & source_words).values()) >= SAME_WORDS * max(words.total(), source_words.total())


def write_rows(rows: list[dict[str, str]], path: Path) -> None:
    """Gzipped JSON lines, byte for byte the same for the same rows (no time, no file name in the header)."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=9) as file:
        file.write(lines.encode("utf-8"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("html", type=Path, help="folder with one folder a language (en-US, fr-FR, …)")
    parser.add_argument("output", type=Path, help="folder to write LL.jsonl.gz into")
    parser.add_argument("--languages", nargs="+", default=[ENGLISH, "fr-FR", "de-DE"], help="folders to extract")
    arguments = parser.parse_args(argv)
    english = read_language(arguments.html / ENGLISH)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for language in arguments.languages:
        pages = english if language == ENGLISH else read_language(arguments.html / language)
        try:
            rows = extract(pages, english, translated=language != ENGLISH)
        except ValueError as error:
            print(f"{language}: {error}", file=sys.stderr)
            return 2
        path = arguments.output / f"{language.split('-')[0]}.jsonl.gz"
        write_rows(rows, path)
        characters = sum(len(row["text"]) for row in rows)
        print(f"{path.name}: {len(rows)} paragraphs, {characters} characters, {path.stat().st_size} bytes compressed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
