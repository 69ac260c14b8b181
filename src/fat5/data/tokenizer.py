"""The tokenizer as FAT5 needs it: special ids found by name, and documents encoded so that no text becomes a special.

`load_tokenizer` reads what `fat5 tokenizer` writes, and the tokenizers of T5, FLAN-T5, mT5, umT5 and ByT5. Whatever is
missing is added (mode tokens), and what cannot be done without is refused (sentinels). Only JSON is read: a pickle is
refused by name, and code that comes with a tokenizer is never run.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fat5.errors import TokenizerError

MULTIPLE = 128
MODES = ("[R]", "[S]", "[X]")
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
_BYTE_T5_SENTINELS = 125


@dataclass(frozen=True)
class TokenizerInfo:
    """The ids a data pipeline needs, as plain integers.

    `vocab_size` is the size of the embedding: the ids rounded up to a multiple of 128. `sentinel_ids[i]` is the id of
    `<extra_id_i>`. `sha256` is that of `tokenizer.json` as FAT5 saves it.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    unk_id: int
    sentinel_ids: tuple[int, ...]
    mode_ids: dict[str, int]
    sha256: str

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in a shard: 2 up to a vocabulary of 65,536, else 4."""
        return 2 if self.vocab_size <= 1 << 16 else 4

    @property
    def dtype(self) -> np.dtype:
        """Little-endian unsigned integers of `token_bytes`."""
        return np.dtype("<u2" if self.token_bytes == 2 else "<u4")


class Tokenizer:
    """A tokenizer and its special ids. Encoding treats text as text: `</s>` in a document is five characters.

    Args:
        content: the content of `tokenizer.json`.
        text: its bytes on disk, where it needs no change to be used; they are kept as they are.
        names: `pad`, `eos` and `unk` → token, where they differ from `<pad>`, `</s>`, `<unk>`.
        source: what to call it in an error.

    Attributes:
        own_size: ids in the file. own_modes: the mode tokens among them; those it lacks are added behind them.
    """

    def __init__(
        self, content: dict[str, Any], text: bytes | None, names: dict[str, str], source: object = "tokenizer"
    ) -> None:
        ids = _ids(content, source)
        self.names = {"pad": PAD, "eos": EOS, "unk": UNK} | names
        for role, token in self.names.items():
            if token not in ids:
                raise TokenizerError(
                    f"no {role} token {token!r}", where=source, hint="T5-family tokenizers have <pad>, </s> and <unk>"
                )
        # What the file itself holds; a T5 of others has no mode tokens, and its model has never seen those added here.
        self.own_size = max(ids.values()) + 1
        self.own_modes = tuple(mode for mode in MODES if mode in ids)
        sentinels = _sentinels(ids)
        if not sentinels:
            raise TokenizerError(
                "no sentinel tokens (<extra_id_0>, <extra_id_1>, …), which span corruption needs",
                where=source,
                hint="Train one with `fat5 tokenizer`, or use a T5-family tokenizer",
            )
        changed = _adapt(content, ids, [*self.names.values(), *sentinels])
        self.content = content
        self.text = text if text is not None and not changed else _dump(content)
        ids = _ids(content, source)
        self.size = max(ids.values()) + 1
        self.info = TokenizerInfo(
            vocab_size=-(-self.size // MULTIPLE) * MULTIPLE,
            pad_id=ids[self.names["pad"]],
            eos_id=ids[self.names["eos"]],
            unk_id=ids[self.names["unk"]],
            sentinel_ids=tuple(ids[token] for token in sentinels),
            mode_ids={mode: ids[mode] for mode in MODES},
            sha256=hashlib.sha256(self.text).hexdigest(),
        )
        self._sentinel_names = sentinels

    @cached_property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` that stock `transformers` uses: specials in the text are specials."""
        return _backend(self.content)

    @cached_property
    def _documents(self) -> Any:
        """The same model without special tokens: none can come out of a document."""
        content = json.loads(json.dumps(self.content))
        content |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        reserved = {self.info.pad_id, self.info.eos_id, *self.info.sentinel_ids, *self.info.mode_ids.values()}
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):
            for index in {*reserved, self.info.unk_id}:
                if index < len(vocabulary):
                    vocabulary[index][0] = self._unreachable(index)
        else:
            for token, index in list(vocabulary.items()):
                if index in reserved:
                    del vocabulary[token]
                    vocabulary[self._unreachable(index)] = index
        return _backend(content)

    @cached_property
    def _reserved(self) -> np.ndarray:
        """bool (size,): ids that no document may hold."""
        table = np.zeros(self.info.vocab_size, bool)
        table[[self.info.pad_id, self.info.eos_id, *self.info.sentinel_ids, *self.info.mode_ids.values()]] = True
        return table

    def _unreachable(self, index: int) -> str:
        return f"\x00reserved {index} {self.info.sha256}\x00"

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes documents, without special tokens, whatever their text says.

        Returns:
            Token ids of all texts one after another (total,), uint16 or uint32, and the tokens of each: int64 (len,).
        """
        encodings = self._documents.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.empty(int(lengths.sum()), self.info.dtype)
        start = 0
        for one in ids:
            tokens[start : start + len(one)] = one
            start += len(one)
        if self._reserved[tokens].any():
            raise TokenizerError("a document encodes to a special token", hint="Report this text as an issue of FAT5")
        return tokens, lengths

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of one text, without EOS; with `special`, the names of special tokens in it stand for their ids."""
        if special:
            return list(self.backend.encode(text, add_special_tokens=False).ids)
        return [int(token) for token in self.encode_documents([text])[0]]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of some ids; special tokens show by name unless skipped. Ids above the vocabulary show nothing."""
        kept = [int(index) for index in ids if int(index) < self.size]
        return str(self.backend.decode(kept, skip_special_tokens=skip_special_tokens))

    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which stock `AutoTokenizer` loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": self.names["pad"],
            "eos_token": self.names["eos"],
            "unk_token": self.names["unk"],
            "extra_special_tokens": [*MODES, *self._sentinel_names],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000_000,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        (folder / TOKENIZER_FILE).write_bytes(self.text)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return folder


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer from a folder, a `tokenizer.json`, or a name on the Hugging Face hub.

    Raises:
        TokenizerError: not there, damaged, a pickle, or without what T5-family models need.
    """
    folder = Path(path)
    if folder.is_file():
        refuse_pickle(folder)
        if folder.suffix != ".json":
            raise TokenizerError("not a tokenizer", where=path, hint="Give a folder that holds tokenizer.json")
        folder, file = folder.parent, folder
    elif folder.is_dir():
        file = folder / TOKENIZER_FILE
    else:
        if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1:
            raise TokenizerError("no such tokenizer", where=path, hint="Train one with `fat5 tokenizer`")
        return _from_transformers(str(path))
    config = _read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
    if not file.exists():
        if config.get("tokenizer_class") == "ByT5Tokenizer":
            return Tokenizer(byte_tokenizer(), None, {}, path)
        if (folder / "spiece.model").exists():
            return _from_transformers(str(path))
        for other in sorted(folder.iterdir()):
            if other.is_file():
                refuse_pickle(other)
        raise TokenizerError("no tokenizer.json in this folder", where=path, hint="Train one with `fat5 tokenizer`")
    content = _read_json(file)
    names = {}
    for role in ("pad", "eos", "unk"):
        token = config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            names[role] = token
    return Tokenizer(content, file.read_bytes(), names, path)


def byte_tokenizer() -> dict[str, Any]:
    """ByT5's tokenizer as a `tokenizer.json`: byte b is id b + 3, then 125 sentinels (Xue et al. 2022)."""
    specials = [PAD, EOS, UNK]
    vocabulary = {token: index for index, token in enumerate([*specials, *(f"<0x{byte:02X}>" for byte in range(256))])}
    sentinels = [f"<extra_id_{index}>" for index in range(_BYTE_T5_SENTINELS)]
    added = [(vocabulary[token], token) for token in specials]
    added += [(len(vocabulary) + index, token) for index, token in enumerate(sentinels)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(index, token) for index, token in added],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": append_eos(vocabulary[EOS]),
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def added_token(index: int, token: str) -> dict[str, Any]:
    """An entry of `added_tokens`: special, matched as it is written.

    A sentinel takes the white space to its left, and a mode token that to its right, so that a prompt written with
    spaces (`[R] Le <extra_id_0> dort`) gives the tokens of training, where a span holds the space before it.
    """
    flags = {"single_word": False, "lstrip": token.startswith("<extra_id_"), "rstrip": token in MODES}
    return {"id": index, "content": token, **flags, "normalized": False, "special": True}


def append_eos(eos_id: int, eos: str = EOS) -> dict[str, Any]:
    """The post-processor of T5: EOS after the text, and after each of a pair."""
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, end, second, end],
        "special_tokens": {eos: {"id": eos, "ids": [eos_id], "tokens": [eos]}},
    }


def refuse_pickle(path: Path) -> None:
    """Raises TokenizerError where a file is a pickle (or a zip of pickles), by its first bytes."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(_PICKLES):
        raise TokenizerError("a pickle, which FAT5 never loads: it can run code", where=path, hint="Use tokenizer.json")


def _ids(content: dict[str, Any], source: object) -> dict[str, int]:
    """Token → id over the model's vocabulary and the added tokens."""
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):
            ids = {entry[0]: index for index, entry in enumerate(vocabulary)}
        else:
            ids = dict(vocabulary)
        ids |= {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise TokenizerError("tokenizer.json lacks its model or vocabulary", where=source) from error
    return ids


def _sentinels(ids: dict[str, int]) -> list[str]:
    """Names of `<extra_id_0>`, `<extra_id_1>`, … while they are there (mT5 writes them with a leading ▁)."""
    found: list[str] = []
    while True:
        name = f"<extra_id_{len(found)}>"
        match = next((token for token in (name, f"▁{name}") if token in ids), None)
        if match is None:
            return found
        found.append(match)


def _adapt(content: dict[str, Any], ids: dict[str, int], reserved: list[str]) -> bool:
    """Adds missing mode tokens and makes every reserved token special; returns whether anything changed."""
    before = json.dumps(content)
    content["truncation"] = content["padding"] = None
    present = {entry["content"]: entry for entry in content["added_tokens"]}
    size = max(ids.values()) + 1
    for mode in MODES:
        if mode not in present:
            index = ids.get(mode, size)
            size = max(size, index + 1)
            content["added_tokens"].append(added_token(index, mode))
    for token in reserved:
        if token in present:
            present[token]["special"] = True
    return json.dumps(content) != before


def _backend(content: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(json.dumps(content, ensure_ascii=False))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"tokenizer.json is not one `tokenizers` can load ({str(error)[:120]})") from error


def _dump(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8") + b"\n"


def _read_json(path: Path) -> dict[str, Any]:
    refuse_pickle(path)
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise TokenizerError("damaged: not JSON", where=path, hint="Restore it, or train it again") from error
    if not isinstance(content, dict):
        raise TokenizerError("damaged: not a JSON object", where=path, hint="Restore it, or train it again")
    return content


def _from_transformers(name: str) -> Tokenizer:
    """A tokenizer without `tokenizer.json` at hand: from the hub, or converted from SentencePiece by transformers."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the hub and the converters raise many kinds
        reason = str(error).strip().splitlines()
        raise TokenizerError(
            f"cannot be loaded ({reason[0][:160] if reason else type(error).__name__})",
            where=name,
            hint="Give the folder of a tokenizer, or a name on the Hugging Face hub",
        ) from error
    if type(loaded).__name__.startswith("ByT5"):
        return Tokenizer(byte_tokenizer(), None, {}, name)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError("has no fast (tokenizers) form", where=name)
    roles = {"pad": loaded.pad_token, "eos": loaded.eos_token, "unk": loaded.unk_token}
    return Tokenizer(json.loads(backend.to_str()), None, {k: v for k, v in roles.items() if v}, name)
