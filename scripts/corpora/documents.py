"""Documents of a corpus: every page, message, description and dictionary entry of the packages, as paragraphs."""

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from corpora.archives import Package, decompress
from corpora.markup import (
    read_blocks,
    read_catalogue,
    read_descriptions,
    read_lyx,
    read_roff,
    read_stardict,
    read_xml,
)
from corpora.rows import HEADWORD_SHARE, LEAST_WORDS, count_words, split_of, split_of_headword
from corpora.sources import LITTRE, Packages, read_glosses, read_help, read_manuals

# Of Littré's entries, the history of a word (in the French of its centuries) and its etymology are left out.
LITTRE_SECTIONS = ("REMARQUE", "REMARQUES", "SYNONYME", "PROVERBE", "PROVERBES", "SUPPLÉMENT AU DICTIONNAIRE")
BLOCK, PAGE = LEAST_WORDS["block"], LEAST_WORDS["page"]


class Document(NamedTuple):
    """Package and name of a document, its split, its paragraphs, and the fewest words it may have."""

    package: str
    name: str
    split: str
    paragraphs: list[str]
    least: int = PAGE


def read_documents(packages: Packages) -> Iterator[Document]:
    """Every document of the packages, one package after another.

    Pages of the help and of the manual have the splits that tasks give them; of the rest, a hundredth each is held out
    for validation and test.
    """
    for name, package in sorted(packages.items()):
        if name.startswith("libreoffice-help"):
            for page, (title, by_id) in read_help(package).items():
                yield Document(name, page, split_of(page), [title, *by_id.values()])
        elif name.startswith("manpages"):
            for _, page, paragraphs in read_manuals(package):
                yield Document(name, page, split_of(page), paragraphs)
        elif name.startswith("denckring"):
            for word, senses in read_glosses(package):
                gloss = f"{word} : {' '.join(senses)}"
                yield Document(name, word, split_of_headword(word), [gloss], LEAST_WORDS["gloss"])
        elif name == LITTRE:
            yield from _entries(package)
        else:
            yield from _pages(package)


def _entries(package: Package) -> Iterator[Document]:
    """Entries of Littré's dictionary: senses and quotations, without authors and works."""
    index = next((path for path in package.files if path.endswith(".idx")), "")
    entries = next((path for path in package.files if path.endswith(".dict.dz")), "")
    if index and entries:
        for word, markup in read_stardict(package.files[index], decompress(package, entries).encode()):
            pronounced, source = r"<i><small>.*?</small></i>", r",? *<span foreground=.#(?:B22222|556B2F).>.*?</span>"
            text = re.sub(f"{pronounced}|{source}", "", markup, flags=re.DOTALL)
            first, *rest = re.split(r"<b><big>(.*?)</big></b>", text)
            sections = zip(rest[::2], rest[1::2], strict=True)
            text = "\n".join([first, *(section for head, section in sections if head in LITTRE_SECTIONS)])
            text = re.sub(r"([.?!…])\.(?!\.)", r"\1", re.sub(r"<[^>]*>", "", text))
            lines = [" ".join(line.split()) for line in text.splitlines()]
            lines = [line for line in lines if count_words(line) > 1]
            if lines:
                name = word.capitalize()
                yield Document(package.name, word, split_of_headword(word), [f"{name} : {lines[0]}", *lines[1:]], BLOCK)


def _pages(package: Package) -> Iterator[Document]:
    for path, content in sorted(package.files.items()):
        if "-big-page" in path:  # a whole book once more, which also comes in pages
            continue
        document = partial(Document, package.name)
        split = split_of(path, HEADWORD_SHARE)
        if path.endswith(".gz"):
            yield document(path, split, read_roff(decompress(package, path)))
        elif path.endswith(".mo"):
            for original, translation in read_catalogue(content):
                identity = hashlib.sha256(original.encode()).hexdigest()[:12]
                # What holds variables or is code is no sentence.
                if original != translation and not re.search(r"[$%{}|=\\]|^\W*\(?\^", translation):
                    lines = re.sub(r"<[^>]*>", "", translation).split("\n")
                    texts = [re.sub(r"[ \t]+", " ", line).strip() for line in lines]
                    name = f"{path}#{identity}"
                    yield document(name, split_of(name, HEADWORD_SHARE), [text for text in texts if text], BLOCK)
        elif path.endswith(".bz2"):  # pages of KDE's manuals, in one file
            parts = re.split(r'<FILENAME filename="([^"]*)">', decompress(package, path))
            for page, html in zip(parts[1::2], parts[2::2], strict=True):
                name = f"{path}#{page}"
                blocks = _long(block.text for block in read_blocks(html.encode()))
                yield document(name, split_of(name, HEADWORD_SHARE), blocks)
        elif path.startswith("/Translation-"):
            for name, paragraphs in read_descriptions(content.decode(errors="replace")):
                yield document(name, split_of(name, HEADWORD_SHARE), paragraphs)
        elif path.endswith(".lyx"):
            yield document(path, split, read_lyx(content.decode(errors="replace")))
        elif path.endswith(".html"):
            yield document(path, split, _long(block.text for block in read_blocks(content)))
        else:
            yield document(path, split, _long(read_xml(content)))


def _long(texts: Iterator[str] | list[str]) -> list[str]:
    return [text for text in texts if count_words(text) >= BLOCK]


def is_prose(paragraph: str) -> bool:
    """Whether most characters are letters or spaces, as they are not in tables, listings and formulas."""
    return sum(one.isalpha() or one.isspace() for one in paragraph) >= 0.75 * len(paragraph)
