"""The tokenizer of FAT5: special ids are found by name, and no text of a document becomes a special token.

`load_tokenizer` reads what `fat5 tokenizer` writes, and every tokenizer with sentinels that `AutoTokenizer` reads: T5,
FLAN-T5, mT5, umT5, ByT5, and T5s with a byte-level BPE (CodeT5) or WordPiece vocabulary. Missing mode tokens are added;
a tokenizer without sentinels is refused. Pickles are refused, and code that comes with a tokenizer never runs.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fat5.data.tokenizer import json_file
from fat5.errors import TokenizerError
from fat5.files import naming, refuse_pickle


@dataclass(frozen=True)
class TokenizerInfo:
    """The ids that a data pipeline needs.

    `vocab_size` is that of the embedding: the number of ids, rounded up to a multiple of 128. `sentinel_ids[i]` is the
    id of `<extra_id_i>`. `sha256` is the hash of `tokenizer.json` as FAT5 saves it.
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
        return np.dtype(f"<u{self.token_bytes}")


class Tokenizer:
    """A tokenizer and its special ids. Encoding treats text as text: `</s>` in a document is four characters.

    Tokens that a user added as not special are text, and are found in documents.

    Args:
        content: the content of `tokenizer.json`.
        text: its bytes on disk, which are kept if the content needs no change.
        names: `pad`, `eos` and `unk` → token, if they differ from `<pad>`, `</s>`, `<unk>`.
        source: its name in errors.

    Attributes:
        own_size: number of ids in the file. own_modes: its mode tokens; missing ones are added behind the other ids.
        own_opening: ids that the file's post-processor puts before a text, such as the `<s>` of CodeT5. They are not
            used in training, and the tokenizer that is saved has none.
    """

    def __init__(
        self, content: dict[str, Any], text: bytes | None, names: dict[str, str], source: object = "tokenizer"
    ) -> None:
        ids = json_file.ids_of(content, source)
        self.names = {"pad": json_file.PAD, "eos": json_file.EOS, "unk": json_file.UNK} | names
        for role, token in self.names.items():
            if token not in ids:
                raise TokenizerError(
                    f"no {role} token {token!r}", where=source, hint="T5-family tokenizers have <pad>, </s> and <unk>"
                )
        # A T5 of others has no mode tokens, and its model has never seen those added here.
        self.own_size = max(ids.values()) + 1
        self.own_modes = tuple(mode for mode in json_file.MODES if mode in ids)
        self.own_opening = json_file.opening_ids(content.get("post_processor"), source)
        sentinels = json_file.sentinel_names(ids)
        if not sentinels:
            raise TokenizerError(
                "no sentinel tokens (<extra_id_0>, <extra_id_1>, …), which span corruption needs",
                where=source,
                hint="Train one with `fat5 tokenizer`, or use a T5-family tokenizer",
            )
        changed = json_file.adapt(content, ids, [*self.names.values(), *sentinels])
        if self.own_opening:
            content["post_processor"] = json_file.append_eos(ids[self.names["eos"]], self.names["eos"])
            changed = True
        self.content = content
        self.text = text if text is not None and not changed else json_file.dump(content)
        ids = json_file.ids_of(content, source)
        self.size = max(ids.values()) + 1
        self.info = TokenizerInfo(
            vocab_size=-(-self.size // json_file.MULTIPLE) * json_file.MULTIPLE,
            pad_id=ids[self.names["pad"]],
            eos_id=ids[self.names["eos"]],
            unk_id=ids[self.names["unk"]],
            sentinel_ids=tuple(ids[token] for token in sentinels),
            mode_ids={mode: ids[mode] for mode in json_file.MODES},
            sha256=hashlib.sha256(self.text).hexdigest(),
        )
        self._sentinel_names = sentinels

    @cached_property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` that stock `transformers` uses: specials in the text are specials."""
        return _backend(self.content)

    @cached_property
    def _documents(self) -> Any:
        """The same model without special tokens, so that no document yields one."""
        content = json.loads(json.dumps(self.content))
        content |= {"post_processor": None, "truncation": None, "padding": None}
        reserved = {self.info.pad_id, self.info.eos_id, *self.info.sentinel_ids, *self.info.mode_ids.values()}
        vocabulary = content["model"]["vocab"]
        learned = {entry[0] for entry in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)
        added = content["added_tokens"]
        # `tokenizers` numbers added tokens in order, so a special token keeps its place under another name.
        for entry in added:
            if entry["special"] and entry["content"] not in learned:
                entry["content"] = self._unreachable(entry["id"])
        kept = [entry for entry in added if not (entry["special"] and entry["content"] in learned)]
        content["added_tokens"] = kept if any(not entry["special"] for entry in kept) else []
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
        """bool (vocab_size,): ids that no document may have."""
        table = np.zeros(self.info.vocab_size, bool)
        table[[self.info.pad_id, self.info.eos_id, *self.info.sentinel_ids, *self.info.mode_ids.values()]] = True
        return table

    def _unreachable(self, index: int) -> str:
        return f"\x00reserved {index} {self.info.sha256}\x00"

    def is_reserved(self, tokens: np.ndarray) -> np.ndarray:
        """Which ids below `vocab_size` no document may have: padding, EOS, sentinels, mode tokens."""
        return self._reserved[tokens]

    def check_rows(self, rows: int, where: object = None) -> None:
        """Raises TokenizerError if the tokenizer has more tokens than a model has rows of embeddings."""
        if self.own_size > rows:
            raise TokenizerError(
                f"the tokenizer has {self.own_size:,} tokens, and the model only {rows:,} rows for them", where=where,
                hint="They do not belong together; give the model its own tokenizer",
            )  # fmt: skip

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes documents as plain text, without special tokens.

        Returns their token ids one after another, uint16 or uint32, and the number of each, int64 (len(texts),).
        """
        ids = _ids(self._documents, texts)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        tokens = np.fromiter(chain.from_iterable(ids), self.info.dtype, int(lengths.sum()))
        if self.is_reserved(tokens).any():
            raise TokenizerError("a document encodes to a special token", hint="Report this text as an issue of FAT5")
        return tokens, lengths

    def encode_each(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of each text, as `encode_documents` gives them."""
        tokens, lengths = self.encode_documents(texts)
        return np.split(tokens, np.cumsum(lengths)[:-1]) if len(texts) else []

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """For each text: its token ids as `encode_documents` gives them, and the characters [begin, end) of each."""
        return [(one.ids, one.offsets) for one in _encoded(self._documents.encode_batch, texts)]

    def encode(self, text: str, special: bool = False, after: str = "") -> list[int]:
        """Ids of one text, without EOS. With `special`, names of special tokens in it become their ids.

        `after` is the text before it, if a token ends between the two: alone, SentencePiece would put a space before
        the comma of ", un".
        """
        if special:
            return _ids(self.backend, [text])[0]
        if not after:
            return [int(token) for token in self.encode_documents([text])[0]]
        alone, before, whole = (part.tolist() for part in self.encode_each([text, after, after + text]))
        return whole[len(before) :] if whole[: len(before)] == before else alone

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False, after: Iterable[int] = ()) -> str:
        """Text of some ids; special tokens appear by name unless skipped, and ids above the vocabulary do not appear.

        `after` are the ids before them: SentencePiece and WordPiece write no space before the first word of a text.
        """
        before = [int(index) for index in after if int(index) < self.size]
        kept = [*before, *(int(index) for index in ids if int(index) < self.size)]
        text = str(self.backend.decode(kept, skip_special_tokens=skip_special_tokens))
        if not before:
            return text
        left = str(self.backend.decode(before, skip_special_tokens=skip_special_tokens))
        # A decoder may change the last characters of `left` when a token follows.
        same = next((index for index, (one, other) in enumerate(zip(left, text)) if one != other), len(left))
        return text[same:]

    def save(self, folder: str | Path) -> Path:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which stock `AutoTokenizer` loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": self.names["pad"],
            "eos_token": self.names["eos"],
            "unk_token": self.names["unk"],
            "extra_special_tokens": [*json_file.MODES, *self._sentinel_names],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000_000,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        with naming(folder):
            (folder / json_file.TOKENIZER_FILE).write_bytes(self.text)
            text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
            (folder / json_file.CONFIG_FILE).write_text(text, encoding="utf-8")
        return folder

    save_pretrained = save  # what Trainer calls for the tokenizer of a collator


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer from a folder, a `tokenizer.json`, or a name on the Hugging Face hub.

    TokenizerError if it is missing, damaged, a pickle, or without the special tokens of T5.
    """
    folder = Path(path)
    if folder.is_file():
        refuse_pickle(folder, TokenizerError)
        if folder.suffix != ".json":
            raise TokenizerError("not a tokenizer", where=path, hint="Give a folder that holds tokenizer.json")
        folder, file = folder.parent, folder
    elif folder.is_dir():
        file = folder / json_file.TOKENIZER_FILE
    else:
        if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1:
            raise TokenizerError("no such tokenizer", where=path, hint="Train one with `fat5 tokenizer`")
        return _from_transformers(str(path))
    if not file.exists():
        try:
            return _from_transformers(str(path))
        except TokenizerError:
            for other in sorted(folder.iterdir()):
                if other.is_file():
                    refuse_pickle(other, TokenizerError)
            if not any((folder / name).exists() for name in (json_file.CONFIG_FILE, "config.json")):
                hint = "Train one with `fat5 tokenizer`"
                raise TokenizerError("no tokenizer in this folder", where=path, hint=hint) from None
            raise
    content = json_file.read_json(file)
    roles: dict[str, Any] = {}
    for name in (json_file.SPECIALS_FILE, json_file.CONFIG_FILE):
        if (folder / name).exists():
            roles |= json_file.read_json(folder / name)
    return Tokenizer(content, file.read_bytes(), json_file.role_names(roles), path)


def _backend(content: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(json.dumps(content, ensure_ascii=False))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"tokenizer.json is not one `tokenizers` can load ({str(error)[:120]})") from error


def _ids(backend: Any, texts: Sequence[str]) -> list[list[int]]:
    return [one.ids for one in _encoded(backend.encode_batch_fast, texts)]


def _encoded(encode: Callable[..., list[Any]], texts: Sequence[str]) -> list[Any]:
    try:
        return encode(list(texts), add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exception
        hint = "Put its unknown token into the vocabulary of the model, in tokenizer.json"
        raise TokenizerError(f"the tokenizer cannot encode a text ({str(error)[:120]})", hint=hint) from error


def read_stock(name: str | Path, cls: Any = None) -> Any:
    """Loads a tokenizer from a folder or the hub with `AutoTokenizer` or `cls`; code that comes with it never runs."""
    from transformers import AutoTokenizer

    try:
        loaded = (cls or AutoTokenizer).from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the hub and the converters raise many kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise TokenizerError(
            f"AutoTokenizer cannot read it ({reason})",
            where=name,
            hint="Give the folder of a tokenizer, or a name on the Hugging Face hub",
        ) from error
    files = [file for file in loaded.vocab_files_names.values() if isinstance(file, str)]
    if files and Path(name).is_dir() and not any((Path(name) / file).is_file() for file in files):
        # Without its files, a class of transformers makes an empty vocabulary.
        raise TokenizerError(
            f"its class, {type(loaded).__name__}, reads {' or '.join(files)}, which this folder does not have",
            where=name,
            hint="Put them there, or name the right tokenizer_class in tokenizer_config.json",
        )
    return loaded


def _from_transformers(name: str) -> Tokenizer:
    """A tokenizer without `tokenizer.json`: from the hub, or converted by transformers from the files of its class."""
    return _from_stock(read_stock(name), name)


def as_tokenizer(given: object) -> Tokenizer:
    """A `Tokenizer` from one, from what `load_tokenizer` loads, or from a tokenizer of transformers with a fast form.

    TokenizerError as `load_tokenizer`.
    """
    if isinstance(given, Tokenizer):
        return given
    return load_tokenizer(given) if isinstance(given, str | Path) else _from_stock(given, type(given).__name__)


def _from_stock(loaded: Any, name: str) -> Tokenizer:
    if type(loaded).__name__.startswith("ByT5"):
        return Tokenizer(json_file.byte_tokenizer(loaded.added_tokens_decoder), None, {}, name)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        hint = "Give a folder, or what AutoTokenizer.from_pretrained returns"
        raise TokenizerError("has no fast (tokenizers) form", where=name, hint=hint)
    return Tokenizer(json.loads(backend.to_str()), None, json_file.role_names(loaded.special_tokens_map), name)
