"""Tokens of one vocabulary found in another: the same text however spaces are written, or the pieces that spell it."""

from pathlib import Path

import pytest

from fat5.data.tokenizer.json_file import ids_of
from fat5.data.tokenizer.loading import Tokenizer, load_tokenizer
from fat5.data.tokenizer.matching import match_tokens
from made_tokenizers import KINDS

KEPT = {
    ("sentencepiece", "byte_level"): {"Ġle": "▁le", "l": "l", "Ġ": "▁", "<pad>": "<pad>", "</s>": "</s>"},
    ("sentencepiece", "word_piece"): {"le": "▁le", "##e": "e", "[PAD]": "<pad>", "[SEP]": "</s>", "[UNK]": "<unk>"},
    ("byte_level", "sentencepiece"): {"▁le": "Ġle", "e": "e", "▁": "Ġ", "<unk>": "<unk>"},
    ("byte_level", "byte_t5"): {"<0x61>": "a", "<0x20>": "Ġ", "<0xC3>": "Ã"},
    ("word_piece", "byte_level"): {"Ġle": "le", "e": "##e", "<extra_id_9>": "extra9", "</s>": "[SEP]"},
    ("byte_t5", "sentencepiece"): {"<pad>": "<pad>", "</s>": "</s>", "<extra_id_9>": "<extra_id_9>"},
}
SPELLED = {
    ("sentencepiece", "byte_level"): {"le": ["l", "e"]},
    ("sentencepiece", "word_piece"): {"a": ["▁", "a"]},
    ("byte_level", "sentencepiece"): {"▁un": ["Ġ", "u", "n"], "é": ["Ã", "©"]},
    ("word_piece", "byte_level"): {"le": ["##l", "##e"]},
    ("byte_t5", "sentencepiece"): {"▁le": ["<0x20>", "<0x6C>", "<0x65>"], "é": ["<0xC3>", "<0xA9>"], "a": ["<0x61>"]},
}
FRESH = {
    ("sentencepiece", "byte_level"): ["<mask>", "!", "Z", "[R]"],
    ("word_piece", "byte_level"): ["!", "[S]"],
    ("byte_t5", "sentencepiece"): ["[R]", "[S]", "[X]"],
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: load_tokenizer(make(folder / name)) for name, make in KINDS.items()}


@pytest.mark.parametrize("pair", KEPT, ids="-to-".join)
def test_texts_and_roles(tokenizers: dict[str, Tokenizer], pair: tuple[str, str]) -> None:
    old, new = (tokenizers[name] for name in pair)
    was, now = ids_of(old.content, ""), ids_of(new.content, "")
    match = match_tokens(old, new, old.info.vocab_size, new.info.vocab_size)
    for token, same in KEPT[pair].items():
        assert match.same[now[token]] == was[same], token
    for token, pieces in SPELLED.get(pair, {}).items():
        assert match.spelled[now[token]] == [was[piece] for piece in pieces], token
    for token in FRESH.get(pair, []):
        assert match.same[now[token]] == -1
        assert now[token] not in match.spelled, token
    assert sum(match.counts().values()) == new.info.vocab_size
    assert not set(match.spelled) & {index for index, one in enumerate(match.same) if one >= 0}


def test_the_same_tokenizer_keeps_all_rows(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        match = match_tokens(tokenizer, tokenizer, 600, 640)
        assert match.same.tolist() == [*range(600), *[-1] * 40]
        assert not match.spelled


def test_a_user_s_token_is_its_text(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    added = load_tokenizer(KINDS["sentencepiece"](tmp_path / "added", added=["le", "noyau"]))
    old, now = tokenizers["sentencepiece"], ids_of(added.content, "")
    match = match_tokens(old, added, old.info.vocab_size, added.info.vocab_size)
    was = ids_of(old.content, "")
    assert match.spelled[now["noyau"]] == [was[letter] for letter in "noyau"]
    assert match.same[now["▁noyau"]] == was["▁noyau"]
    back = match_tokens(added, tokenizers["byte_level"], added.info.vocab_size, 384)
    assert back.same[ids_of(tokenizers["byte_level"].content, "")["le"]] == now["le"]
