"""Small tokenizers of each kind that T5s come with, as the folders that people have."""

import json
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import ByT5Tokenizer, T5Tokenizer

SENTINELS = 10
_LETTERS = "abcdefghijklmnopqrstuvwxyz.,'é"


def sentencepiece(folder: Path, added: Any = ()) -> Path:
    """T5's own: Unigram, with `▁` for the space before a word; `added` are a user's tokens."""
    letters = [(letter, -3.0 - index / 100) for index, letter in enumerate(_LETTERS)]
    words = [(f"▁{word}", -2.5) for word in ("le", "un", "noyau", "paquet", "pour", "de")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *words, *letters]
    return _save(T5Tokenizer(vocab=vocabulary, extra_ids=SENTINELS), folder, added)


def byte_t5(folder: Path, added: Any = ()) -> Path:
    """ByT5: a class that has no file."""
    return _save(ByT5Tokenizer(), folder, added)


def byte_level(folder: Path) -> Path:
    """CodeT5's: vocab.json and merges.txt, whose class puts `<s>` before a text."""
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet()), "le", "Ġle"]
    sentinels = [f"<extra_id_{index}>" for index in reversed(range(SENTINELS))]
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _write(
        folder,
        {
            "vocab.json": {token: index for index, token in enumerate(pieces)},
            "merges.txt": "#version: 0.2\nl e\nĠ le\n",
            "added_tokens.json": {token: len(pieces) + index for index, token in enumerate(sentinels)},
            "special_tokens_map.json": specials | {"additional_special_tokens": sentinels},
            "tokenizer_config.json": {"tokenizer_class": "RobertaTokenizer"} | specials,
        },
    )


def word_piece(folder: Path) -> Path:
    """A vocab.txt as of BERT, with `extra0`, … for sentinels, as Chinese T5s have it."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"extra{index}" for index in range(SENTINELS))]
    pieces += [*_LETTERS, *(f"##{letter}" for letter in _LETTERS), "le", "un", "noyau", "paquet", "pour", "de"]
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    return _write(folder, {"vocab.txt": "\n".join(pieces) + "\n", "tokenizer_config.json": config})


KINDS = {"sentencepiece": sentencepiece, "byte_t5": byte_t5, "byte_level": byte_level, "word_piece": word_piece}


def _save(tokenizer: Any, folder: Path, added: Any) -> Path:
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    return folder


def _write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
