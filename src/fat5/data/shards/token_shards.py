"""Token shards on disk: the manifest, and memory-mapped reading that names a damaged file.

A prepared folder holds `manifest.json`, one folder a split (`train/`, `validation/`) and `tokenizer/`. A shard is
datatrove's token file: `NAME.ds` with the token ids of its documents one after another (little-endian uint16, or uint32
for vocabularies above 65,536), and `NAME.ds.index` with the end of each document (uint64, in tokens). No special
tokens are stored. Sizes are checked when a folder is opened, and each shard's SHA-256 when it is first read (`verify`
checks all at once). `.verified/` remembers the shards that passed, by size and modification time.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fat5.errors import DataError
from fat5.files import file_sha256, is_count, is_number, parse_json, write_atomically

FORMAT = "fat5-shards"
VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
END_BYTES = 8
RESTORE = "Restore it, or prepare the corpus again"


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest: its file relative to the folder, its sizes, and the SHA-256 of both its files."""

    file: str
    documents: int
    tokens: int
    bytes: int
    sha256: str
    index_sha256: str
    unknown: int | None = None
    """`<unk>` tokens, for text without a token; None in an old manifest that does not count them"""


@dataclass(frozen=True)
class Manifest:
    """The content of a prepared folder. It is written last, so a folder with a manifest is complete."""

    name: str
    tokenizer_sha256: str
    vocab_size: int
    token_bytes: int
    validation_fraction: float
    shards: dict[str, list[ShardEntry]] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    bad_rows: int = 0

    def documents(self, split: str) -> int:
        """Documents in one split."""
        return sum(entry.documents for entry in self.shards[split])

    def tokens(self, split: str) -> int:
        """Tokens in one split."""
        return sum(entry.tokens for entry in self.shards[split])

    def unknown(self, split: str) -> int | None:
        """`<unk>` tokens in one split; None if the manifest does not count them."""
        counts = [entry.unknown for entry in self.shards[split]]
        return None if None in counts else sum(count or 0 for count in counts)

    def to_json(self) -> str:
        """The text of `manifest.json`; equal manifests give equal texts."""
        content = {"format": FORMAT, "version": VERSION} | asdict(self)
        content["splits"] = {
            split: {count: getattr(self, count)(split) for count in ("documents", "tokens", "unknown")}
            for split in self.shards
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


class TokenShards:
    """The documents of one split, memory-mapped. Opening reads file sizes only, however large the corpus is.

    Documents are numbered over all shards in manifest order, and have no special tokens.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self.entries = manifest.shards[split]
        self.dtype = np.dtype(f"<u{manifest.token_bytes}")
        self._first = np.concatenate([[0], np.cumsum([entry.documents for entry in self.entries], dtype=np.int64)])
        self._maps: dict[Path, np.ndarray] = {}
        check_sizes(folder, manifest, split)

    @property
    def num_documents(self) -> int:
        """Documents in this split."""
        return int(self._first[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens in this split."""
        return self.manifest.tokens(self.split)

    def __iter__(self) -> Iterator[np.ndarray]:
        for shard in range(len(self.entries)):
            tokens, ends = self.shard_tokens(shard), self.shard_ends(shard)
            start = 0
            for end in ends.tolist():
                yield tokens[start:end]
                start = end

    def __getstate__(self) -> dict[str, Any]:
        """Workers reopen the maps instead of copying them."""
        return self.__dict__ | {"_maps": {}}

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document: a read-only view (length,) into the shard; IndexError if there is none."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        local = index - int(self._first[shard])
        ends = self.shard_ends(shard)
        start = int(ends[local - 1]) if local else 0
        return self.shard_tokens(shard)[start : int(ends[local])]

    def shard_tokens(self, shard: int) -> np.ndarray:
        """All tokens of one shard, memory-mapped read-only; DataError if its hash, checked the first time, is wrong."""
        entry = self.entries[shard]
        path = self.folder / entry.file
        if path not in self._maps:
            check_hash(path, entry.sha256, self.folder, self.manifest)
            self._maps[path] = _map(path, self.dtype)
        return self._maps[path]

    def shard_ends(self, shard: int) -> np.ndarray:
        """Document ends of one shard, memory-mapped read-only uint64; DataError as `shard_tokens`."""
        entry = self.entries[shard]
        path = self.folder / f"{entry.file}.index"
        if path not in self._maps:
            check_hash(path, entry.index_sha256, self.folder)
            ends = _map(path, np.dtype("<u8"))
            last = int(ends[-1]) if ends.size else 0
            if last != entry.tokens or (ends[1:] < ends[:-1]).any():
                raise DataError("does not divide its shard into documents", where=path, hint="Prepare it again")
            self._maps[path] = ends
        return self._maps[path]


def open_shards(folder: str | Path, split: str = "train") -> TokenShards:
    """Opens one split of a prepared folder; checks that every shard is there and has its size.

    Raises:
        DataError: no manifest, an unknown split, a shard missing or of the wrong size (named).
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if split not in manifest.shards:
        raise DataError(f"no split {split!r}", where=folder, hint=f"It has {', '.join(manifest.shards)}")
    return TokenShards(folder, split, manifest)


def verify(folder: str | Path) -> Manifest:
    """Checks every shard of every split, even those that passed before; DataError names the first damaged file."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    for entries in manifest.shards.values():
        for entry in entries:
            check_hash(folder / entry.file, entry.sha256, folder, manifest, again=True)
            check_hash(folder / f"{entry.file}.index", entry.index_sha256, folder, again=True)
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        DataError: missing, not JSON, of another format or version, or naming files outside the folder.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        begun = (path.parent / "logs").exists()
        hint = "Run `fat5 prepare` again to finish it" if begun else "Make it with `fat5 prepare`"
        raise DataError("no manifest.json: not a (complete) folder of token shards", where=folder, hint=hint)
    try:
        content = parse_json(path.read_bytes(), strict=True)
        if content["format"] != FORMAT:
            raise KeyError("format")
        if content["version"] != VERSION:
            raise DataError(
                f"shard format version {content['version']}, this FAT5 reads version {VERSION}",
                where=path,
                hint="Prepare the corpus again",
            )
        shards = {split: [read_entry(entry) for entry in entries] for split, entries in content["shards"].items()}
        content.setdefault("bad_rows", 0)
        fields = {key: content[key] for key in Manifest.__dataclass_fields__ if key != "shards"}
        manifest = Manifest(**fields, shards=shards)
        texts = (manifest.name, manifest.tokenizer_sha256, *manifest.steps)
        counts = (manifest.token_bytes, manifest.vocab_size, manifest.bad_rows)
        typed = all(map(is_count, counts)) and all(isinstance(text, str) for text in texts)
        if not typed or not is_number(manifest.validation_fraction) or manifest.token_bytes not in (2, 4):
            raise KeyError("a value of another type")
        if not 0 < manifest.vocab_size <= 1 << 8 * manifest.token_bytes:
            raise KeyError("vocab_size")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError("not a manifest of token shards, or damaged", where=path, hint="Prepare it again") from error
    return manifest


def read_entry(content: Any) -> ShardEntry:
    """A shard's entry in a manifest; raises KeyError or TypeError if a value has the wrong type."""
    entry = ShardEntry(**content)
    path = Path(entry.file)
    hashes = isinstance(entry.sha256, str) and isinstance(entry.index_sha256, str)
    unknown = 0 if entry.unknown is None else entry.unknown
    counts = all(map(is_count, (entry.documents, entry.tokens, entry.bytes, unknown)))
    if not hashes or not counts or path.is_absolute() or ".." in path.parts or "\0" in entry.file:
        raise KeyError(entry.file)
    return entry


def check_sizes(folder: Path, manifest: Manifest, split: str | None = None) -> None:
    """Raises DataError, naming the file, if a shard or index (of one split) is missing or has the wrong size."""
    for entry in [entry for name in manifest.shards if split in (None, name) for entry in manifest.shards[name]]:
        if entry.bytes != entry.tokens * manifest.token_bytes:
            raise DataError(f"manifest contradicts itself about {entry.file}", where=folder, hint="Prepare it again")
        for name, size in ((entry.file, entry.bytes), (f"{entry.file}.index", entry.documents * END_BYTES)):
            path = folder / name
            try:
                found = path.stat().st_size
            except OSError as error:
                raise DataError("shard is missing", where=path, hint=RESTORE) from error
            if found != size:
                raise DataError(f"shard has {found:,} bytes, its manifest says {size:,}", where=path, hint=RESTORE)


def check_hash(path: Path, expected: str, folder: Path, manifest: Manifest | None = None, again: bool = False) -> None:
    """Raises DataError, naming the file, if its SHA-256 is not `expected`, or a token beyond the manifest's vocabulary.

    A file that passed is remembered by size and modification time, so that a terabyte is not read at each start;
    `again` checks it even so.
    """
    stamp = folder / ".verified" / path.relative_to(folder).as_posix().replace("/", "--")
    status = path.stat()
    seal = f"{expected} {status.st_size} {status.st_mtime_ns}"
    with suppress(OSError):
        if not again and stamp.read_text() == seal:
            return
    if file_sha256(path) != expected:
        raise DataError("shard is damaged: its SHA-256 is not the manifest's", where=path, hint=RESTORE)
    largest = int(_map(path, np.dtype(f"<u{manifest.token_bytes}")).max(initial=0)) if manifest else 0
    if manifest and largest >= manifest.vocab_size:
        raise DataError(
            f"shard holds token {largest:,}, and its manifest's vocabulary is {manifest.vocab_size:,}",
            where=path,
            hint="Prepare the corpus again",
        )
    with suppress(OSError):  # a read-only folder is verified at every start
        stamp.parent.mkdir(exist_ok=True)
        write_atomically(stamp, seal)


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
