"""Prompts and answers: what the model is shown, and how its answer becomes text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from fat5.data import Tokenizer, load_tokenizer
from fat5.data.tokenizer.json_file import added_token, byte_tokenizer
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer
from fat5.errors import ConfigurationError, DataError, TokenizerError
from fat5.generate import Decoding, complete, completion
from fat5.generate.decoding import Decoder
from fat5.generate.step import Step
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from made_tokenizers import KINDS, byte_level, sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(TokenizerTraining(inputs=["sample:fr"], output_dir=str(folder), vocab_size=1024, rows=200))
    return load_tokenizer(folder)


@pytest.fixture
def model(tokenizer: Tokenizer) -> FAT5ForConditionalGeneration:
    torch.manual_seed(0)
    config = FAT5Config.preset("fat5-demo", vocab_size=tokenizer.info.vocab_size, num_layers=1, num_decoder_layers=1)
    return FAT5ForConditionalGeneration(config).eval()


class Scripted(torch.nn.Linear):
    """Stands for a trained model: notes what it is shown, writes what it is told."""

    def __init__(self, rows: list[list[int]]) -> None:
        super().__init__(1, 1)
        self.config = FAT5Config.preset("fat5-demo")
        self.generation_config = GenerationConfig()
        self.rows, self.shown = rows, []

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        start = len(self.shown)
        self.shown += [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask)]
        rows = self.rows[start : start + len(input_ids)]
        width = max(map(len, rows))
        return torch.tensor([[0, *row, *[0] * (width - len(row))] for row in rows])


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


def test_infill_puts_each_span_in_its_blank(tokenizer: Tokenizer) -> None:
    info = tokenizer.info
    first, second = info.sentinel_ids[:2]
    answer = [first, *ids(tokenizer, " noyau"), second, *ids(tokenizer, " libre"), info.eos_id, 7, 7]
    model = Scripted([answer])
    [got] = complete(model, tokenizer, ["Le ___ Linux est <extra_id_1>."])
    assert got.text == "Le noyau Linux est libre."
    assert got.completion == "noyau … libre"
    shown = [info.mode_ids["[R]"], *ids(tokenizer, "Le"), first, *ids(tokenizer, " Linux est"), second]
    assert model.shown == [[*shown, *ids(tokenizer, "."), info.eos_id]]


def test_spans_out_of_order_repeated_and_missing(tokenizer: Tokenizer) -> None:
    first, second, third = tokenizer.info.sentinel_ids[:3]
    a, b, c = (ids(tokenizer, word) for word in (" un", " deux", " trois"))
    model = Scripted([[second, *b, first, *a, second, *c]])
    [got] = complete(model, tokenizer, ["A ___ B ___ C ___"])
    assert got.text == "A un B deux C"
    assert third not in got.text.encode()


def test_continue_appends(tokenizer: Tokenizer) -> None:
    info = tokenizer.info
    model = Scripted([[info.sentinel_ids[0], *ids(tokenizer, " est libre."), info.eos_id]])
    [got] = complete(model, tokenizer, ["Le noyau "])
    assert got.text == "Le noyau est libre."
    assert model.shown[0][0] == info.mode_ids["[S]"]
    assert model.shown[0][-2:] == [info.sentinel_ids[0], info.eos_id]


def test_text_mode_shows_the_prompt_as_it_is(tokenizer: Tokenizer) -> None:
    info = tokenizer.info
    model = Scripted([[*ids(tokenizer, "bonjour"), info.eos_id]])
    [got] = complete(model, tokenizer, ["traduire : hello"], mode="text")
    assert (got.completion, got.text) == ("bonjour", "bonjour")
    assert model.shown == [[*ids(tokenizer, "traduire : hello"), info.eos_id]]


def test_answers_come_in_the_order_of_the_prompts_whatever_the_batch(
    model: FAT5ForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    prompts = ["Le ___ est long, très long, et même plus long que les autres.", "Un ___.", "Le serveur ___ vite."]
    short, two = Decoding(max_new_tokens=8), Decoding(max_new_tokens=8, batch_size=2)
    alone = [complete(model, tokenizer, [prompt], mode="text", decoding=short)[0] for prompt in prompts]
    together = complete(model, tokenizer, prompts, mode="text", decoding=two)
    assert together == alone
    assert [answer.prompt for answer in together] == prompts
    assert any(answer.completion for answer in together)


def test_sampling_follows_the_seed_and_leaves_the_global_one_alone(
    model: FAT5ForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    before = torch.get_rng_state()
    draw = [
        complete(
            model, tokenizer, ["Le noyau."], mode="text", decoding=Decoding(max_new_tokens=12, sample=True, seed=seed)
        )
        for seed in (1, 1, 2)
    ]
    assert draw[0] == draw[1] != draw[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"sample": True, "top_p": 0.9}, {"repetition_penalty": 1.4}],
    ids=["greedy", "beam", "sample", "penalty"],
)
def test_both_loops_write_the_same(
    model: FAT5ForConditionalGeneration, tokenizer: Tokenizer, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["Le ___ est long, très long.", "Un serveur ___ vite.", "Le ___."]
    settings = {"max_new_tokens": 12, "batch_size": 2, **how}
    stock = complete(model, tokenizer, prompts, decoding=Decoding(loop="stock", **settings))
    monkeypatch.setattr(model, "generate", None)
    assert complete(model, tokenizer, prompts, decoding=Decoding(**settings)) == stock


def test_batches_share_a_step_where_recording_pays(
    model: FAT5ForConditionalGeneration, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"Le noyau ___ est libre{', et gratuit' * n}." for n in range(7)]
    asked = []

    class Watched(Decoder):
        def generate(self, *given: Any, cuda_graph: bool, **how: Any) -> torch.Tensor:
            asked.append(cuda_graph)
            return super().generate(*given, **how)

        def _step(self, *shape: Any, shared: bool) -> Step:
            return super()._step(*shape, shared=asked[-1])

    monkeypatch.setattr(completion, "Decoder", Watched)
    answers = []
    for least in (5, 4):
        monkeypatch.setattr(completion, "pays", lambda device, batches: batches >= least)  # noqa: B023
        answers.append(
            complete(model, tokenizer, prompts, decoding=Decoding(batch_size=2, max_new_tokens=6, cuda_graphs=True))
        )
    assert asked == [False] * 4 + [True] * 4
    assert answers[0] == answers[1]


def test_sampling_among_beams_goes_to_stock(model: FAT5ForConditionalGeneration, tokenizer: Tokenizer) -> None:
    assert complete(model, tokenizer, ["Le ___."], decoding=Decoding(max_new_tokens=4, num_beams=2, sample=True))
    with pytest.raises(ConfigurationError, match=r"loop: .* does not obey do_sample with num_beams"):
        complete(model, tokenizer, ["Le ___."], decoding=Decoding(num_beams=2, sample=True, loop="fat5"))
    with pytest.raises(ConfigurationError, match="does not serve a Scripted"):
        complete(Scripted([]), tokenizer, ["Le ___."], decoding=Decoding(loop="fat5"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 0),
        ("num_beams", 0),
        ("batch_size", -1),
        ("temperature", 0.0),
        ("repetition_penalty", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("temperature", float("nan")),
        ("loop", "fast"),
    ],
)
def test_a_number_out_of_range_names_its_key(key: str, value: float | str) -> None:
    with pytest.raises(ConfigurationError, match=key):
        Decoding(**{key: value})


def test_what_cannot_be_completed_is_refused(tokenizer: Tokenizer) -> None:
    model = Scripted([])
    with pytest.raises(DataError, match="Mark each blank"):
        complete(model, tokenizer, ["no blank"], mode="infill")
    with pytest.raises(DataError, match="300 blanks"):
        complete(model, tokenizer, ["a ___ " * 300])
    with pytest.raises(ConfigurationError, match="mode token"):
        complete(model, tokenizer, ["a"], mode_token="[Q]")
    with pytest.raises(ConfigurationError, match="no mode 'fill'"):
        complete(model, tokenizer, ["a"], mode="fill")
    with pytest.raises(ConfigurationError, match="prefix: has no place in mode continue"):
        complete(model, tokenizer, ["a"], mode="continue", prefix="fr: ")
    model.config.prefix = 5
    with pytest.raises(ConfigurationError, match=r"prefix in config.json: is 5, and no text"):
        complete(model, tokenizer, ["a"])


def test_a_prefix_stands_before_a_text_once(tokenizer: Tokenizer) -> None:
    shown = []
    for prompt, how in (("fr: un", {"mode": "text"}), ("un", {"prefix": "fr: "}), ("fr: un", {"prefix": "fr: "})):
        model = Scripted([[tokenizer.info.eos_id]])
        complete(model, tokenizer, [prompt], **how)
        shown += model.shown
    assert shown == [[*tokenizer.encode("fr: un"), tokenizer.info.eos_id]] * 3


def test_special_names_in_a_prompt_are_text(tokenizer: Tokenizer) -> None:
    info = tokenizer.info
    model = Scripted([[info.eos_id]])
    complete(model, tokenizer, ["un </s> et [X]"])
    assert info.eos_id not in model.shown[0][:-1]
    assert info.mode_ids["[X]"] not in model.shown[0]


def test_a_tokenizer_without_mode_tokens_puts_none() -> None:
    """As those of FLAN-T5, mT5 and ByT5, whose models have never seen one."""
    own = Tokenizer(byte_tokenizer(), None, {})
    sentinel = own.info.sentinel_ids[0]
    for prompt, mode in (("Le ___.", "infill"), ("Le", "continue")):
        model = Scripted([[sentinel, 70, own.info.eos_id]])
        complete(model, own, [prompt], mode=mode)
        assert model.shown == [[*own.encode("Le"), sentinel, *own.encode("." if mode == "infill" else ""), 1]]
    with pytest.raises(ConfigurationError, match="Its tokenizer has none"):
        complete(Scripted([]), own, ["Le ___."], mode_token="[R]")


@pytest.mark.parametrize("kind", KINDS)
def test_words_keep_the_space_between_them(kind: str, tmp_path: Path) -> None:
    """Whatever the tokenizer: a span decoded apart from the word to its left would lose its space."""
    own = load_tokenizer(KINDS[kind](tmp_path))
    first, second = own.info.sentinel_ids[:2]

    def behind(left: str, text: str) -> list[int]:
        return own.encode(text, after=left)

    answer = [first, *behind("le", " paquet de"), second, *behind("un", " noyau"), own.info.eos_id]
    [got] = complete(Scripted([answer]), own, ["le ___ pour un ___, le."])
    assert (got.text, got.completion) == ("le paquet de pour un noyau, le.", "paquet de … noyau")
    [got] = complete(Scripted([[first, *behind("le", " paquet de")]]), own, ["le "], mode="continue")
    assert (got.text, got.completion) == ("le paquet de", "paquet de")
    # Blanks that touch, and one at the start.
    answer = [first, *own.encode("le"), second, *behind("le", " paquet")]
    [got] = complete(Scripted([answer]), own, ["___ ___ pour"])
    assert got.text == "le paquet pour"
    [got] = complete(Scripted([[*own.encode("le paquet"), own.info.eos_id]]), own, ["un"], mode="text")
    assert got.text == "le paquet"


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_shown_in_the_tokens_of_training(kind: str, tmp_path: Path) -> None:
    own = load_tokenizer(KINDS[kind](tmp_path))
    info, whole = own.info, own.encode("le noyau, un")
    model = Scripted([[info.eos_id]])
    complete(model, own, ["le ___, un"])
    le, noyau = own.encode("le"), own.encode(" noyau", after="le")
    rest = whole[len(le) + len(noyau) :]
    assert whole == [*le, *noyau, *rest]
    assert model.shown == [[*own.own_opening, *le, info.sentinel_ids[0], *rest, info.eos_id]]


def test_a_line_break_before_a_blank_is_the_space_of_the_span(tmp_path: Path) -> None:
    own = load_tokenizer(sentencepiece(tmp_path))
    first = own.info.sentinel_ids[0]
    [got] = complete(Scripted([[first, *own.encode(" noyau", after="le")]]), own, ["le\n___ un"])
    assert got.text == "le\nnoyau un"


@pytest.mark.parametrize("mode", ["infill", "continue", "text"])
def test_what_the_tokenizer_puts_first_is_put_first(mode: str, tmp_path: Path) -> None:
    """The <s> of CodeT5, as stock's tokenizer puts it."""
    own = load_tokenizer(byte_level(tmp_path))
    model = Scripted([[own.info.eos_id]])
    complete(model, own, ["le ___"], mode=mode)
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert model.shown[0][0] == stock.bos_token_id
    assert model.shown[0].count(stock.bos_token_id) == 1
    if mode == "text":
        assert model.shown == [stock("le ___").input_ids]


# What the model's generation_config.json says, beside what is asked for.


ASKED = ["Le ___ est long.", "Un ___ vite."]


@pytest.mark.parametrize(
    "fields",
    [
        {"no_repeat_ngram_size": 1, "max_new_tokens": 9},
        {"num_beams": 3, "min_new_tokens": 4, "max_length": 10},
        {"do_sample": True, "top_k": 5, "temperature": 2.0},
        {"forced_bos_token_id": 700, "decoder_start_token_id": 9, "suppress_tokens": [701, 702]},
        {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 3, "num_beams": 3},
    ],
    ids=["no repetition", "beams", "sampling", "forced", "returns"],
)
def test_generation_config_is_obeyed_as_stock_does(
    model: FAT5ForConditionalGeneration,
    tokenizer: Tokenizer,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = complete(model, tokenizer, ASKED)
    model.generation_config.update(**fields)
    stock = complete(model, tokenizer, ASKED, decoding=Decoding(loop="stock"))
    monkeypatch.setattr(model, "generate", None)
    assert complete(model, tokenizer, ASKED) == stock != plain


@pytest.mark.parametrize("name", ["sequence_bias", "length_penalty", "of_tomorrow"])
def test_what_our_loop_cannot_do_goes_to_stock(
    model: FAT5ForConditionalGeneration, tokenizer: Tokenizer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = {"sequence_bias": [[[700], 50.0]]}.get(name, 3.0)
    model.generation_config.num_beams = 2
    setattr(model.generation_config, name, value)
    called = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **how: called.append(1) or generate(**how))
    complete(model, tokenizer, ASKED)
    assert called
    with pytest.raises(ConfigurationError, match=f"does not obey {name}. Use --loop stock"):
        complete(model, tokenizer, ASKED, decoding=Decoding(loop="fat5"))


def test_what_is_asked_for_wins_over_generation_config(
    model: FAT5ForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    plain = complete(model, tokenizer, ASKED, decoding=Decoding(max_new_tokens=8))
    model.generation_config.update(do_sample=True, max_new_tokens=30, num_beams=2)
    asked = Decoding(max_new_tokens=8, sample=False, num_beams=1)
    assert complete(model, tokenizer, ASKED, decoding=asked) == plain


def test_a_generation_config_without_a_start_takes_that_of_the_model(
    model: FAT5ForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    """Where stock `generate` alone would refuse."""
    plain = complete(model, tokenizer, ASKED)
    model.config.decoder_start_token_id = 700
    model.generation_config.decoder_start_token_id = None
    ours, stock = (complete(model, tokenizer, ASKED, decoding=Decoding(loop=loop)) for loop in ("fat5", "stock"))
    assert ours == stock != plain


def test_every_end_of_generation_config_ends_an_answer(
    model: FAT5ForConditionalGeneration, tokenizer: Tokenizer
) -> None:
    model.generation_config.forced_bos_token_id = end = 700
    assert complete(model, tokenizer, ["Le"], mode="text")[0].text
    model.generation_config.eos_token_id = [tokenizer.info.eos_id, end]
    assert complete(model, tokenizer, ["Le"], mode="text")[0].text == ""


def test_what_transformers_refuses_is_one_error(model: FAT5ForConditionalGeneration, tokenizer: Tokenizer) -> None:
    model.generation_config.stop_strings = ["a"]
    with pytest.raises(ConfigurationError, match=r"generation_config.json: .*tokenizer"):
        complete(model, tokenizer, ASKED)


@pytest.mark.parametrize("key", ["max_new_tokens", "num_beams"])
def test_answers_larger_than_memory_are_refused_before_they_begin(
    model: FAT5ForConditionalGeneration, tokenizer: Tokenizer, key: str
) -> None:
    for loop in ("auto", "stock"):
        with pytest.raises(ConfigurationError, match=r"max_new_tokens, num_beams: 1 x .* need .* GiB, and .* are free"):
            complete(model, tokenizer, ["Le ___"], decoding=Decoding(loop=loop, **{key: 10**9}))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(model: FAT5ForConditionalGeneration) -> None:
    content = byte_tokenizer()
    content["added_tokens"].append(added_token(5000, "<far>"))
    with pytest.raises(TokenizerError, match=r"has 5,001 tokens, and the model only 1,024 rows"):
        complete(model, Tokenizer(content, None, {}), ["Le ___."])
