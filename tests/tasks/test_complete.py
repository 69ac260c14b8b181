"""Prompts and answers: what the model is shown, and how its answer becomes text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from fat5.data import Tokenizer, load_tokenizer
from fat5.data.tokenizer_json import added_token, byte_tokenizer
from fat5.data.tokenizer_training import TokenizerTraining, train_tokenizer
from fat5.errors import ConfigurationError, DataError, TokenizerError
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.tasks import Decoding, complete


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    train_tokenizer(TokenizerTraining(inputs=["sample:fr"], output_dir=str(folder), vocab_size=1024, rows=200))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
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


def test_beam_search_runs_and_differs_from_sampling(model: FAT5ForConditionalGeneration, tokenizer: Tokenizer) -> None:
    beams = complete(model, tokenizer, ["Le ___."], decoding=Decoding(max_new_tokens=6, num_beams=3))
    assert beams[0].text.startswith("Le")


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


def test_sampling_among_beams_goes_to_stock(model: FAT5ForConditionalGeneration, tokenizer: Tokenizer) -> None:
    assert complete(model, tokenizer, ["Le ___."], decoding=Decoding(max_new_tokens=4, num_beams=2, sample=True))
    with pytest.raises(ConfigurationError, match="loop: .* does not obey do_sample with num_beams"):
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


def test_special_names_in_a_prompt_are_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
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


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(model: FAT5ForConditionalGeneration) -> None:
    content = byte_tokenizer()
    content["added_tokens"].append(added_token(5000, "<far>"))
    with pytest.raises(TokenizerError, match=r"has 5,001 tokens, and the model only 1,024 rows"):
        complete(model, Tokenizer(content, None, {}), ["Le ___."])
