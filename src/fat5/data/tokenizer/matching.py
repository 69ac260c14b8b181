"""From which embeddings of an old vocabulary those of a new one start: `match_tokens`.

A token stands for bytes (a space before a word included), or, if it is special, for its role. A new token keeps the
embedding of the old token that stands for the same; else it starts from those by which the old tokenizer spells it.
"""

import json
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fat5.data.tokenizer import json_file
from fat5.data.tokenizer.loading import Tokenizer

ANCHORS = ("x", "(", "e", "1")
"""A token without a space before it is spelled behind one of these, since alone it would be taken for a word's start.
The first one that stays a token of its own is taken."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
Meaning = tuple[str, Hashable]
"""("text", bytes), ("byte", 0 to 255), ("role", pad, eos or unk), ("sentinel", number), ("mode" or "special", name)"""


@dataclass
class TokenMatch:
    """The old ids whose embeddings each new id starts from."""

    same: np.ndarray
    """int64 (new rows,): the old id whose embedding is kept, or -1"""
    spelled: dict[int, list[int]] = field(default_factory=dict)
    """New id → old ids, whose mean it starts from. Ids in neither are fresh: they start from the mean of all"""

    def counts(self) -> dict[str, int]:
        """How many rows are kept, averaged, fresh."""
        kept, averaged = int((self.same >= 0).sum()), len(self.spelled)
        return {"kept": kept, "averaged": averaged, "fresh": len(self.same) - kept - averaged}


def match_tokens(old: Tokenizer, new: Tokenizer, old_rows: int, new_rows: int) -> TokenMatch:
    """Matches the vocabulary of `new` to that of `old`.

    Equal tokenizers keep every row. Otherwise a token keeps the row of the old one with its text or role. Other text
    gets the ids by which the old tokenizer spells it, unless its unknown token is among them; a sentinel beyond the old
    ones gets all of these. Rows of no token keep rows of no token.

    Args:
        old_rows, new_rows: of the embeddings, at least the ids of the tokenizers.
    """
    match = TokenMatch(np.full(new_rows, -1, np.int64))
    if old.info.sha256 == new.info.sha256:
        match.same[:old_rows] = np.arange(old_rows)
        return match
    known: dict[Meaning, int] = {}
    for index, meaning in sorted(_meanings(old).items()):
        known.setdefault(meaning, index)
    texts: dict[int, bytes] = {}
    for index, meaning in _meanings(new, added_modes=True).items():
        kind, value = meaning
        found = known.get(meaning)
        if found is None and isinstance(value, int) and kind == "byte":
            found = known.get(("text", bytes([value])))
        if found is not None:
            match.same[index] = found
        elif kind == "sentinel":
            match.spelled[index] = list(old.info.sentinel_ids)
        elif isinstance(value, bytes):
            texts[index] = value
    match.spelled |= {index: ids for index, ids in zip(texts, _spell(old, known, list(texts.values()))) if ids}
    unused = np.arange(old.own_size, old_rows)[: new_rows - new.size]
    match.same[new.size : new.size + len(unused)] = unused
    return match


def _meanings(tokenizer: Tokenizer, added_modes: bool = False) -> dict[int, Meaning]:
    """Id → what it stands for; mode tokens that FAT5 added itself only on request."""
    info, content, ids = tokenizer.info, tokenizer.content, json_file.ids_of(tokenizer.content, "tokenizer")
    modes = json_file.MODES if added_modes else tokenizer.own_modes
    special: dict[int, Meaning] = {
        entry["id"]: ("special", entry["content"]) for entry in content["added_tokens"] if entry["special"]
    }
    for mode, index in info.mode_ids.items():
        special.pop(index, None)
        if mode in modes:
            special[index] = ("mode", mode)
    special |= {index: ("sentinel", number) for number, index in enumerate(info.sentinel_ids)}
    special |= {info.pad_id: ("role", "pad"), info.eos_id: ("role", "eos"), info.unk_id: ("role", "unk")}
    literal = {entry["content"] for entry in content["added_tokens"]}
    has_bytes, read = bool(content["model"].get("byte_fallback")), _reader(content)
    meanings: dict[int, Meaning] = {}
    for token, index in ids.items():
        byte = _BYTE.fullmatch(token) if has_bytes else None
        if index in special:
            meanings[index] = special[index]
        elif byte is not None:
            meanings[index] = ("byte", int(byte[1], 16))
        elif index not in info.mode_ids.values():
            meanings[index] = ("text", token.encode() if token in literal else read(token))
    return meanings


def _reader(content: dict[str, Any]) -> Callable[[str], bytes]:
    """What makes the bytes of a text from a token of the vocabulary, in the tokenizer's own spelling."""
    parts = json.dumps([content.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    model = content["model"]
    if '"ByteLevel"' in parts:
        table = _byte_letters()
        return lambda token: bytes(table[letter] for letter in token) if set(token) <= table.keys() else token.encode()
    if model.get("type") == "WordPiece":
        inside = model.get("continuing_subword_prefix") or "##"
        return lambda token: (token[len(inside) :] if token.startswith(inside) else f" {token}").encode()
    if "▁" in parts:
        return lambda token: token.replace("▁", " ").encode()
    return str.encode


def _byte_letters() -> dict[str, int]:
    """The letter that a byte-level vocabulary writes for each byte (Radford et al. 2019)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _spell(old: Tokenizer, known: dict[Meaning, int], texts: Sequence[bytes]) -> list[list[int]]:
    """The old ids of each text, as within a longer one; none where the old tokenizer cannot write it."""
    found: list[list[int]] = [[] for _ in texts]
    left: dict[int, str] = {}
    for place, text in enumerate(texts):
        try:
            left[place] = text.decode()
        except UnicodeDecodeError:  # a part of a character
            ids = [known.get(("byte", byte), known.get(("text", bytes([byte])), -1)) for byte in text]
            found[place] = ids if -1 not in ids else []
    for anchor in (*ANCHORS, ""):
        texts_behind = [anchor, *(anchor + text for text in left.values())]
        head, *rows = (part.tolist() for part in old.encode_each(texts_behind))
        for place, row in zip(list(left), rows):
            if row[: len(head)] == head and old.info.unk_id not in head:
                found[place] = row[len(head) :]
                del left[place]
    return [[] if old.info.unk_id in ids else ids for ids in found]
