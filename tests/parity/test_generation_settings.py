"""Every field of `GenerationConfig`: obeyed by our loop, or left to stock `generate`."""

import re
from pathlib import Path
from typing import Any

import pytest
from generation import prompts, seeded, until_end
from transformers import GenerationConfig

from fat5.generate.decoding import Decoder
from fat5.generate.settings import (
    DONE,
    STOCK,
    STOCK_AMONG_BEAMS,
    STOCK_IN_SAMPLING,
    WITHOUT_EFFECT,
    left_to_stock,
    settings,
)
from stock import t5_v1_1

LENGTH = 12
BEAMS, SAMPLING = {"num_beams": 3}, {"do_sample": True}
# A value that changes what is written, for each field that our loop obeys, and the fields it needs beside it.
OBEYED: dict[str, tuple[Any, dict[str, Any]]] = {
    "min_new_tokens": (9, {"eos_token_id": [1, 7, 20, 33, 45]}),
    "min_length": (9, {"eos_token_id": [1, 7, 20, 33, 45]}),
    "do_sample": (True, {}),
    "temperature": (3.0, SAMPLING),
    "top_k": (3, SAMPLING),
    "top_p": (0.2, SAMPLING),
    "num_beams": (4, {}),
    "repetition_penalty": (3.0, {}),
    "no_repeat_ngram_size": (1, {}),
    "encoder_no_repeat_ngram_size": (1, {}),
    "bad_words_ids": ([[token] for token in range(2, 90)], {}),
    "suppress_tokens": (list(range(2, 90)), {}),
    "begin_suppress_tokens": (list(range(2, 90)), {}),
    "forced_bos_token_id": (7, {}),
    "forced_eos_token_id": (5, {}),
    "bos_token_id": (9, {"decoder_start_token_id": None}),
    "eos_token_id": (list(range(2, 60)), {}),
    "pad_token_id": (11, {"eos_token_id": list(range(2, 60))}),
    "decoder_start_token_id": (9, {}),
}
# Set by each call.
LENGTHS = {"max_new_tokens", "max_length"}


# Sampling among beams is stock's.
CASES = [
    (name, strategy)
    for name, (value, beside) in OBEYED.items()
    for strategy in ({}, BEAMS, SAMPLING)
    if not {"num_beams", "do_sample"} <= {name, *beside, *strategy}
]


def configured(**fields: Any) -> Any:
    model = t5_v1_1().eval()
    for name, value in fields.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize(("name", "strategy"), CASES, ids=[f"{name}-{[*how, 'greedy'][0]}" for name, how in CASES])
def test_our_loop_obeys(name: str, strategy: dict[str, Any]) -> None:
    value, beside = OBEYED[name]
    without, model = configured(**strategy | beside), configured(**strategy | beside | {name: value})
    batch = prompts()
    want = seeded(model.generate, **batch, max_new_tokens=LENGTH)
    got = seeded(Decoder(model).generate, **batch, max_new_tokens=LENGTH)
    ends = model.generation_config.eos_token_id
    assert until_end(got, ends) == until_end(want, ends)
    if not strategy:
        start = without.generation_config.decoder_start_token_id
        unset = None if start is None else seeded(without.generate, **batch, max_new_tokens=LENGTH).tolist()
        assert want.tolist() != unset


def test_every_field_has_its_place() -> None:
    """A field of a later transformers is in no list, and goes to stock."""
    tables = [DONE, WITHOUT_EFFECT, set(STOCK), set(STOCK_AMONG_BEAMS), set(STOCK_IN_SAMPLING)]
    listed = set().union(*tables)
    assert len(listed) == sum(map(len, tables))
    assert set(OBEYED) | LENGTHS == DONE
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name in fields:
        for strategy in ({}, BEAMS, SAMPLING):
            config = GenerationConfig(**strategy)
            assert left_to_stock(config) == []
            setattr(config, name, 0.123)
            needed = name in STOCK or name not in listed
            needed |= name in STOCK_AMONG_BEAMS and strategy == BEAMS
            needed |= name in STOCK_IN_SAMPLING and strategy == SAMPLING
            assert (name in left_to_stock(config)) == needed, name
    config = GenerationConfig()
    config.of_tomorrow = True
    assert left_to_stock(config) == ["of_tomorrow"]
    assert not fields - listed, "new in this transformers: our loop leaves them to stock; list them in docs/generate.md"


def test_the_page_lists_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (obeyed by our loop|change no token|stock `generate`[^|]*) \| (.+) \|$", page, re.MULTILINE)
    listed = [set(re.findall(r"`(\w+)`", fields)) for _, fields in rows]
    assert listed == [DONE, WITHOUT_EFFECT, set(STOCK), set(STOCK_AMONG_BEAMS), set(STOCK_IN_SAMPLING)]


def test_stock_defaults_change_nothing() -> None:
    """The value of each table is the one that stock itself takes where a field is not given."""
    defaults = GenerationConfig._get_default_generation_params()
    for name, neutral in (STOCK | STOCK_AMONG_BEAMS | STOCK_IN_SAMPLING).items():
        assert defaults.get(name) in (neutral, None), name
        assert left_to_stock(GenerationConfig(**{name: neutral})) == []


def test_what_only_stock_obeys_is_refused_by_name() -> None:
    model = configured(sequence_bias={(3,): 5.0})
    with pytest.raises(ValueError, match="sequence_bias: our decoding loop does not obey this"):
        Decoder(model).generate(**prompts(), max_new_tokens=3)
    with pytest.raises(ValueError, match="num_beam: no field of GenerationConfig"):
        Decoder(model).generate(**prompts(), max_new_tokens=3, num_beam=3)
    assert left_to_stock(GenerationConfig(decoder_start_token_id=[0, 1])) == ["decoder_start_token_id"]


def test_what_a_call_gives_wins() -> None:
    model = configured(num_beams=4, no_repeat_ngram_size=2)
    config = settings(model, {"num_beams": 1})
    assert (config.num_beams, config.no_repeat_ngram_size) == (1, 2)
    assert model.generation_config.num_beams == 4
