"""Rows with their splits and what was removed, and how they are written: the form of every task and corpus."""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpora.near_duplicates import near_duplicates, normalise
from corpora.sources import PACKAGES, Packages
from fat5.files import whole_folder, write_atomically

SPLITS = ("train", "validation", "test")
# Validation has this part of the pages that tasks are made of, or of the headwords, and test as much.
PAGE_SHARE, HEADWORD_SHARE = 0.1, 0.01
LEAST_WORDS = {"pair": 3, "gloss": 4, "block": 8, "page": 20}
LEAST_OF_A_LABEL = 20


@dataclass
class Rows:
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


def count_words(text: str) -> int:
    """The words of a text, punctuation apart."""
    return len(normalise(text).split())


def write_rows(folder: Path, name: str, rows: Rows, packages: Packages, **more: Any) -> dict[str, int]:
    """Writes the splits and counts.json, all or nothing; returns rows by split. `packages` are the sources."""
    sources = [
        {"package": one, "version": found.version, "licence": PACKAGES[one][1], "sha256": found.sha256}
        for one, found in packages.items()
    ]
    counts = {split: sum(one == split for one, _ in rows.rows) for split in SPLITS}
    about = {"task": name, "rows": counts, "removed": dict(rows.removed), "note": rows.note, **more, "sources": sources}
    with whole_folder(folder) as partial_folder:
        for split in SPLITS:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for one, row in rows.rows if one == split)
            write_atomically(partial_folder / f"{split}.jsonl", "".join(lines))
        write_atomically(partial_folder / "counts.json", json.dumps(about, ensure_ascii=False, indent=1) + "\n")
    return counts
