"""The content of `tokenizer.json`: reading it, finding the special tokens in it, and making its parts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fat5.errors import TokenizerError
from fat5.files import is_count, read_object

MULTIPLE = 128
MODES = ("[R]", "[S]", "[X]")
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
_BYTE_T5_SENTINELS = 125

LARGEST_SIZE = 1 << 24  # ids of a tokenizer; the largest in use have 2^18


def read_json(path: Path) -> dict[str, Any]:
    """The content of a tokenizer's JSON file; raises TokenizerError if it is damaged, or a pickle."""
    return read_object(path, TokenizerError, "Restore it, or train it again")


def ids_of(content: dict[str, Any], source: object) -> dict[str, int]:
    """Token → id over the model's vocabulary and the added tokens."""
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):
            ids = {entry[0]: index for index, entry in enumerate(vocabulary)}
        else:
            ids = dict(vocabulary)
            check_ids(ids, source)
        ids |= {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    except (KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError("tokenizer.json lacks its model or vocabulary", where=source) from error
    check_ids(ids, source)
    return ids


def check_ids(ids: Mapping[str, Any], source: object) -> None:
    """Raises TokenizerError, naming the token, unless every id is a whole number in range."""
    odd = next((token for token, index in ids.items() if not is_count(index) or index >= LARGEST_SIZE), None)
    if odd is not None:
        raise TokenizerError(f"the id of {odd[:40]!r} is {str(ids[odd])[:40]}", where=source, hint="Restore the file")


def role_names(roles: Mapping[str, Any]) -> dict[str, str]:
    """`pad`, `eos` and `unk` from `pad_token`, …; in BERT-like tokenizers, `sep_token` ends a text."""
    names: dict[str, str] = {}
    for role, keys in {"pad": ["pad_token"], "eos": ["eos_token", "sep_token"], "unk": ["unk_token"]}.items():
        for key in keys:
            token = roles.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                names.setdefault(role, token)
    return names


def sentinel_names(ids: dict[str, int]) -> list[str]:
    """Names of `<extra_id_0>`, `<extra_id_1>`, … up to the first that is missing.

    mT5 writes them with a leading ▁; Chinese T5s with a BERT vocabulary write `extra0`.
    """
    found: list[str] = []
    while True:
        name = f"<extra_id_{len(found)}>"
        match = next((token for token in (name, f"▁{name}", f"extra{len(found)}") if token in ids), None)
        if match is None:
            return found
        found.append(match)


def opening_ids(post_processor: Any, source: object) -> tuple[int, ...]:
    """Ids that a post-processor of `tokenizer.json` puts before a text."""
    try:
        kind = post_processor["type"] if post_processor else None
        if kind == "Sequence":
            parts = [opening_ids(part, source) for part in post_processor["processors"]]
            return tuple(index for part in reversed(parts) for index in part)
        if kind in ("RobertaProcessing", "BertProcessing"):
            return (int(post_processor["cls"][1]),)
        if kind != "TemplateProcessing":
            return ()
        found: list[int] = []
        for item in post_processor["single"]:
            if "Sequence" in item:
                break
            found += post_processor["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        return tuple(found)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise TokenizerError("tokenizer.json has a damaged post_processor", where=source) from error


def adapt(content: dict[str, Any], ids: dict[str, int], reserved: list[str]) -> bool:
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


def byte_tokenizer(added: Mapping[int, Any] | None = None) -> dict[str, Any]:
    """ByT5's tokenizer as a `tokenizer.json`: byte b is id b + 3, then 125 sentinels (Xue et al. 2022).

    `added`: id → `AddedToken` of a ByT5 tokenizer that differs, with fewer sentinels or tokens of its user.
    """
    specials = [PAD, EOS, UNK]
    vocabulary = {token: index for index, token in enumerate([*specials, *(f"<0x{byte:02X}>" for byte in range(256))])}
    sentinels = [f"<extra_id_{index}>" for index in range(_BYTE_T5_SENTINELS)]
    entries = [added_token(vocabulary[token], token) for token in specials]
    entries += [added_token(len(vocabulary) + index, token) for index, token in enumerate(sentinels)]
    if added is not None:
        usual = {entry["content"]: entry for entry in entries}
        entries = [
            usual.get(token.content, token.__getstate__()) | {"id": index}
            for index, token in sorted(added.items())
            if token.content in specials or index >= len(vocabulary)  # a single byte has its id already
        ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
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
    """An entry of `added_tokens`: special, and not normalized.

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


def dump(content: dict[str, Any]) -> bytes:
    """The bytes of `tokenizer.json`."""
    return json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8") + b"\n"
