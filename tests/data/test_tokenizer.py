"""Tokenizers: lossless on any text, deaf to special tokens spelled in documents, and those of the T5 family."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, T5Tokenizer

from fat5.data import Tokenizer, load_tokenizer, sample_path
from fat5.data.tokenizer.json_file import MODES, added_token, append_eos, byte_tokenizer, opening_ids
from fat5.data.tokenizer.training import TokenizerTraining, alphabet, train_tokenizer
from fat5.errors import ConfigurationError, DataError, RunDirectoryError, TokenizerError
from made_tokenizers import KINDS

VOCABULARY = 2048
HARD_TEXTS = [
    "",
    " ",
    "  deux  espaces  ",
    '\t\tif x:\r\n\t    return {"a": [1, 22, 333]}  # fin\n\n\n',
    "\n",
    "\u00a0:\u202f« l’été »\u2009!",
    "e\u0301 é Å Å ﬁ ½",
    "日本語のテキスト、かな漢字",
    "👩‍👩‍👧‍👦🇫🇷\U0010ffff\x00\x7f\ufeff\u2028",
    "▁ Ġ <0x0A> <0xE2> <unused_3> [UNK]",
    "العربية ﷽ עברית हिन्दी ไทย",
]
SPECIALS = ["<pad>", "</s>", "<unk>", *MODES, "<extra_id_0>", "<extra_id_255>"]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp(request.param) / "tokenizer"
    train_tokenizer(TokenizerTraining([str(sample_path("fr"))], str(output), request.param, VOCABULARY, rows=800))
    return output


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.info.unk_id not in ids


@pytest.mark.parametrize("text", HARD_TEXTS, ids=range(len(HARD_TEXTS)))
def test_round_trip_of_hard_texts(tokenizer: Tokenizer, text: str) -> None:
    round_trip(tokenizer, text)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_round_trip_of_any_unicode(tokenizer: Tokenizer, text: str) -> None:
    round_trip(tokenizer, text)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.sampled_from([*SPECIALS, *HARD_TEXTS, " ", "\n", "\t", "<", "a", "é", "0", "[", "</"])))
def test_round_trip_of_whitespace_code_and_spelled_specials(tokenizer: Tokenizer, parts: list[str]) -> None:
    round_trip(tokenizer, "".join(parts))


def test_round_trip_of_source_code(tokenizer: Tokenizer) -> None:
    for path in (Path(__file__), Path(__file__).with_name("test_shards.py")):
        round_trip(tokenizer, path.read_text(encoding="utf-8"))


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_stock_transformers_gives_the_same_round_trip(folder: Path, text: str) -> None:
    stock = stock_tokenizer(folder)
    ids = stock(text).input_ids
    assert ids[-1] == stock.eos_token_id
    assert stock.decode(ids[:-1]) == text


_STOCK: dict[Path, object] = {}


def stock_tokenizer(folder: Path):
    if folder not in _STOCK:
        _STOCK[folder] = AutoTokenizer.from_pretrained(folder)
    return _STOCK[folder]


def test_layout(tokenizer: Tokenizer) -> None:
    info = tokenizer.info
    assert (info.vocab_size, tokenizer.size) == (VOCABULARY, VOCABULARY)
    assert (info.pad_id, info.eos_id, info.unk_id) == (0, 1, 2)
    assert info.mode_ids == {"[R]": 3, "[S]": 4, "[X]": 5}
    assert info.sentinel_ids == tuple(range(6, 262))
    assert (info.token_bytes, info.dtype) == (2, np.dtype("<u2"))


def test_stock_transformers_reads_the_specials(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    # Beside a T5 model the class named in tokenizer_config.json must still win.
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    for stock in (stock_tokenizer(folder), AutoTokenizer.from_pretrained(tmp_path)):
        info = tokenizer.info
        assert len(stock) == info.vocab_size
        assert (stock.pad_token_id, stock.eos_token_id, stock.unk_token_id) == (0, 1, 2)
        ids = stock("[R] Le <extra_id_0> dort <extra_id_1>").input_ids
        assert ids == [
            info.mode_ids["[R]"],
            *tokenizer.encode("Le"),
            info.sentinel_ids[0],
            *tokenizer.encode(" dort"),
            info.sentinel_ids[1],
            info.eos_id,
        ]
        assert stock.decode(ids, skip_special_tokens=True) == "Le dort"
        pair = stock("a", "b").input_ids
        assert pair == [*tokenizer.encode("a"), 1, *tokenizer.encode("b"), 1]


@pytest.mark.parametrize("special", SPECIALS)
def test_a_special_spelled_in_a_document_stays_text(tokenizer: Tokenizer, special: str) -> None:
    text = f"un {special} deux{special}{special}"
    ids = tokenizer.encode(text)
    info = tokenizer.info
    assert not set(ids) & {info.pad_id, info.eos_id, info.unk_id, *info.sentinel_ids, *info.mode_ids.values()}
    assert tokenizer.decode(ids) == text
    reserved = {info.pad_id, info.eos_id, info.unk_id, *info.sentinel_ids, *info.mode_ids.values()}
    assert set(tokenizer.encode(special, special=True)) <= reserved


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.decode([index]) for index in tokenizer.encode("en 1998, 42e")]
    assert all(not any(c.isdigit() for c in piece) or len(piece) == 1 for piece in pieces)


def test_documents_come_back_flat(tokenizer: Tokenizer) -> None:
    texts = ["un deux", "", "trois"]
    tokens, lengths = tokenizer.encode_documents(texts)
    assert tokens.dtype == np.dtype("<u2")
    assert [tokenizer.decode(part) for part in np.split(tokens, np.cumsum(lengths)[:-1])] == texts


def test_training_bpe_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(TokenizerTraining([str(sample_path("fr"))], str(tmp_path / name), "bpe", VOCABULARY, rows=500))
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_nfc_composes_and_is_off_by_default(tmp_path: Path) -> None:
    train_tokenizer(
        TokenizerTraining([str(sample_path("fr"))], str(tmp_path / "t"), "bpe", 1024, rows=50, normalization="nfc")
    )
    composed = load_tokenizer(tmp_path / "t")
    assert composed.decode(composed.encode("e\u0301 \u212b")) == "é Å"


def test_report_counts_what_encoding_costs(tmp_path: Path) -> None:
    report = train_tokenizer(TokenizerTraining([str(sample_path("fr"))], str(tmp_path / "t"), "bpe", 4096))
    assert report["documents"] == 1923
    assert 1.2 < report["tokens_per_word"] < 2.0
    assert 0.15 < report["tokens_per_byte"] < 0.3
    assert report["unknown_rate"] == 0
    assert 0 < report["byte_fallback_rate"] < 0.005


def test_a_small_corpus_gives_a_smaller_vocabulary_still_a_multiple(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("un deux trois\n" * 3)
    report = train_tokenizer(TokenizerTraining([str(tmp_path / "a.txt")], str(tmp_path / "t")))
    assert report["vocab_size"] < 32_768
    assert report["vocab_size"] % 128 == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "t")) == report["vocab_size"]
    round_trip(load_tokenizer(tmp_path / "t"), "<unused_3> un deux <unused_0>")


def test_alphabet_keeps_frequent_characters_and_breaks_ties_by_code_point() -> None:
    letters = alphabet(["é" * 5, "ü", "ö"], most=98)
    assert letters[:95] == [chr(point) for point in range(32, 127)]
    assert letters[95:] == ["\n", "\t", "é"]
    assert alphabet(["öü"], most=98)[-1] == "ö"


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"vocab_size": 65_664}, ConfigurationError, "above 65,536"),
        ({"vocab_size": 2000}, ConfigurationError, "multiple of 128.*2,048 is the nearest"),
        ({"vocab_size": 128}, ConfigurationError, "640"),
        ({"vocab_size": 512}, ConfigurationError, "640"),
        ({"rows": 0}, ConfigurationError, "rows"),
        ({"inputs": ["/nowhere.txt"]}, DataError, "no such file"),
        ({"inputs": []}, DataError, "no corpus"),
    ],
)
def test_training_that_cannot_be_is_refused(tmp_path: Path, changes: dict, error: type, said: str) -> None:
    keys = {"inputs": [str(sample_path("fr"))], "output_dir": str(tmp_path / "t")} | changes
    with pytest.raises(error, match=said):
        train_tokenizer(TokenizerTraining(**keys))
    assert not (tmp_path / "t").exists()


def test_training_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunDirectoryError, match="holds something"):
        train_tokenizer(TokenizerTraining([str(sample_path("fr"))], str(tmp_path)))


# The T5 family


def t5(folder: Path, sentinels: list[str]) -> Path:
    """A small T5 tokenizer as transformers saves it, with these sentinels after the vocabulary."""
    letters = [(letter, -3.0 - index / 100) for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz/s>_0123")]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -2.5), *dict(letters).items()]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if "extra_id" not in entry["content"]]
    content["model"]["vocab"] = content["model"]["vocab"][: len(vocabulary)]
    content["added_tokens"] += [
        {**added_token(len(vocabulary) + index, name), "special": False} for index, name in enumerate(sentinels)
    ]
    path.write_text(json.dumps(content))
    return folder


def test_t5_sentinels_descend_and_modes_are_added(tmp_path: Path) -> None:
    loaded = load_tokenizer(t5(tmp_path, [f"<extra_id_{index}>" for index in reversed(range(100))]))
    first = loaded.backend.token_to_id("<extra_id_0>")
    assert loaded.info.sentinel_ids == tuple(first - index for index in range(100))
    assert list(loaded.info.mode_ids.values()) == [first + 1, first + 2, first + 3]
    assert loaded.size == first + 4
    assert loaded.info.vocab_size == 256


def test_t5_sentinels_may_lie_anywhere(tmp_path: Path) -> None:
    names = ["<extra_id_2>", "[S]", "<extra_id_0>", "other", "<extra_id_1>", "<extra_id_9>"]
    loaded = load_tokenizer(t5(tmp_path, names))
    at = {name: loaded.backend.token_to_id(name) for name in names}
    assert loaded.info.sentinel_ids == (at["<extra_id_0>"], at["<extra_id_1>"], at["<extra_id_2>"])
    assert loaded.info.mode_ids["[S]"] == at["[S]"]


def test_t5_specials_spelled_in_a_document_stay_text(tmp_path: Path) -> None:
    loaded = load_tokenizer(t5(tmp_path, ["<extra_id_0>", "<extra_id_1>"]))
    for special in ("</s>", "<pad>", "<extra_id_0>", "[R]", "<unk>"):
        tokens, _ = loaded.encode_documents([f"the {special} the", "abc"])
        info = loaded.info
        assert not set(tokens.tolist()) & {info.pad_id, info.eos_id, *info.sentinel_ids, *info.mode_ids.values()}
    assert loaded.decode(loaded.encode("the cat")) == "the cat"


def test_a_saved_t5_tokenizer_is_the_same_and_stock_reads_its_modes(tmp_path: Path) -> None:
    loaded = load_tokenizer(t5(tmp_path / "a", ["<extra_id_1>", "<extra_id_0>"]))
    again = load_tokenizer(loaded.save(tmp_path / "b"))
    assert again.info == loaded.info
    stock = AutoTokenizer.from_pretrained(tmp_path / "b")
    ids = stock("[S] the").input_ids
    assert ids == [loaded.info.mode_ids["[S]"], *loaded.encode("the"), loaded.info.eos_id]


def test_mt5_sentinels_with_a_leading_mark_are_found(tmp_path: Path) -> None:
    loaded = load_tokenizer(t5(tmp_path, ["▁<extra_id_1>", "▁<extra_id_0>"]))
    assert loaded.info.sentinel_ids == (
        loaded.backend.token_to_id("▁<extra_id_0>"),
        loaded.backend.token_to_id("▁<extra_id_1>"),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_autotokenizer_reads(tmp_path: Path, kind: str) -> None:
    """From its own files, and again from what FAT5 saves; its ids are those of transformers."""
    folder = KINDS[kind](tmp_path / "theirs")
    stock, loaded = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    again = load_tokenizer(loaded.save(tmp_path / "ours"))
    assert again.info == loaded.info
    for text in ("le un noyau, paquet.", "de  pour le", "zéro"):
        want = stock(text, add_special_tokens=False).input_ids
        assert loaded.encode(text) == again.encode(text) == want
        assert loaded.decode(want, skip_special_tokens=True) == stock.decode(want, skip_special_tokens=True)
    info = loaded.info
    assert (info.pad_id, info.unk_id) == (stock.pad_token_id, stock.unk_token_id)
    assert info.eos_id == (stock.sep_token_id if stock.eos_token_id is None else stock.eos_token_id)
    names = [name for name in ("<extra_id_1>", "extra1") if name in stock.get_vocab()]
    assert info.sentinel_ids[1] == stock.convert_tokens_to_ids(names[0])
    with_specials = stock("le").input_ids
    assert [*loaded.own_opening, *loaded.encode("le"), info.eos_id] == with_specials
    # Training shows no <s>, so the copy that goes with the model puts none.
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("le").input_ids == with_specials[-2 - (kind == "byte_t5") :]


def test_the_opening_of_each_post_processor() -> None:
    special = {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}
    first, sequence = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [first, sequence, first], "special_tokens": special}
    assert opening_ids(template, "") == (7,)
    assert opening_ids({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}, "") == (0,)
    assert opening_ids({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}, "") == (7,)
    assert opening_ids(append_eos(1), "") == opening_ids(None, "") == ()
    with pytest.raises(TokenizerError, match="damaged post_processor"):
        opening_ids({"type": "TemplateProcessing"}, "")


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_t5"])
def test_tokens_that_a_user_added_are_text(tmp_path: Path, kind: str) -> None:
    folder = KINDS[kind](tmp_path / "theirs", ["\n", "{", "<hello>"])
    stock, loaded = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    again = load_tokenizer(loaded.save(tmp_path / "ours"))
    for text in ("le\nun { noyau<hello> le", "{{\n\n", "le"):
        want = stock(text, add_special_tokens=False).input_ids
        assert loaded.encode(text) == again.encode(text) == want
        assert loaded.info.unk_id not in want
        assert loaded.decode(want) == stock.decode(want)
    assert loaded.encode("</s><extra_id_0>[R]") == load_tokenizer(KINDS[kind](tmp_path / "bare")).encode(
        "</s><extra_id_0>[R]"
    )


def test_tokens_that_a_user_added_behind_special_ones_keep_their_ids(tmp_path: Path) -> None:
    folder = t5(tmp_path, ["<extra_id_1>", "<extra_id_0>", "\n", "{"])
    loaded = load_tokenizer(folder)
    brace = loaded.backend.token_to_id("{")
    assert brace == loaded.info.sentinel_ids[0] + 2
    assert loaded.encode("a\n{") == [*loaded.encode("a"), brace - 1, brace]


def test_a_folder_without_the_files_of_its_class_is_refused(tmp_path: Path) -> None:
    """transformers would make an empty T5 vocabulary and go on."""
    folder = KINDS["word_piece"](tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(TokenizerError, match=r"T5Tokenizer, reads spiece.model or .*name the right tokenizer_class"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_span_is_decoded_and_encoded_in_its_place(tmp_path: Path, kind: str) -> None:
    loaded = load_tokenizer(KINDS[kind](tmp_path))
    whole = loaded.encode("le paquet de, pour")
    for cut in range(1, len(whole)):
        before, behind = whole[:cut], whole[cut:]
        assert loaded.decode(before) + loaded.decode(behind, after=before) == loaded.decode(whole)
    # Samples and audits show whole examples, sentinels by name.
    sentinel = loaded.info.sentinel_ids[0]
    shown = loaded.decode([sentinel, *loaded.encode(" paquet de", after="le")])
    assert shown == f"{loaded.decode([sentinel])} paquet de"
    assert loaded.encode(" paquet de, pour", after="le") == whole[len(loaded.encode("le")) :]
    assert loaded.encode(", un", after="le") == loaded.encode("le, un")[len(loaded.encode("le")) :]


def test_byt5_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    stock = ByT5Tokenizer()
    stock.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in ("abc é 日本 \n\t", HARD_TEXTS[3], HARD_TEXTS[8]):
        assert loaded.encode(text) == stock(text, add_special_tokens=False).input_ids
        round_trip(loaded, text)
    assert loaded.info.sentinel_ids[:2] == tuple(stock.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"]))
    assert (loaded.info.pad_id, loaded.info.eos_id, loaded.info.unk_id) == (0, 1, 2)
    assert loaded.info.vocab_size == 512


def test_a_vocabulary_above_65536_is_read_as_uint32() -> None:
    content = byte_tokenizer()
    content["model"]["vocab"] |= {f"piece{index}": 400 + index for index in range(70_000)}
    info = Tokenizer(content, None, {}).info
    assert (info.vocab_size, info.token_bytes) == (70_528, 4)


# What is refused


def test_without_sentinels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no sentinel tokens"):
        load_tokenizer(t5(tmp_path, []))


def test_without_pad_is_refused() -> None:
    content = byte_tokenizer()
    content["added_tokens"] = content["added_tokens"][1:]
    del content["model"]["vocab"]["<pad>"]
    with pytest.raises(TokenizerError, match="no pad token"):
        Tokenizer(content, None, {})


def test_a_vocabulary_without_its_own_unknown_token_is_one_line_at_the_first_text() -> None:
    content = byte_tokenizer()
    content["model"]["byte_fallback"] = False
    del content["model"]["vocab"]["<unk>"]
    tokenizer = Tokenizer(content, None, {})
    for special in (False, True):
        with pytest.raises(TokenizerError, match=r"cannot encode a text \(Unk token `<unk>` not found"):
            tokenizer.encode("bonjour", special=special)


class _Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/fat5-was-unpickled"),))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.pkl", "pytorch_model.bin"])
def test_a_pickle_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(_Bomb()))
    for given_path in (tmp_path, path):
        with pytest.raises(TokenizerError, match=rf"{name}: a pickle"):
            load_tokenizer(given_path)
    assert not Path("/tmp/fat5-was-unpickled").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not"),
        (b"[]", "is not"),
        (b"\xff\xfe", "is not"),
        (b"{}", "lacks its model"),
        (b'{"model": {"vocab": {"<pad>": 0}}, "added_tokens": 3}', "lacks its model"),
    ],
)
def test_damaged_json_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer in this folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Nope"}')
    with pytest.raises(TokenizerError, match="AutoTokenizer cannot read it"):
        load_tokenizer(tmp_path)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path, "fat5-test/no-such-tokenizer"):
        with pytest.raises(TokenizerError):
            load_tokenizer(path)


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')")
    assert load_tokenizer(tmp_path).info.vocab_size == VOCABULARY
