"""What the classes give back and answer about themselves is what the stock classes do."""

import copy

import pytest
import torch
from transformers import (
    CompileConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
)

import fat5
from fat5.model import (
    FAT5EncoderModel,
    FAT5ForConditionalGeneration,
    FAT5ForQuestionAnswering,
    FAT5ForSequenceClassification,
    FAT5ForTokenClassification,
    FAT5Model,
)
from stock import LOGITS_TOLERANCE, SIZES, difference, fat5_like, rows, t5_v1_1, umt5

PAIRS = {
    "Model": (T5Model, FAT5Model),
    "ForConditionalGeneration": (T5ForConditionalGeneration, FAT5ForConditionalGeneration),
    "EncoderModel": (T5EncoderModel, FAT5EncoderModel),
    "ForSequenceClassification": (T5ForSequenceClassification, FAT5ForSequenceClassification),
    "ForTokenClassification": (T5ForTokenClassification, FAT5ForTokenClassification),
    "ForQuestionAnswering": (T5ForQuestionAnswering, FAT5ForQuestionAnswering),
}
EACH_PAIR = pytest.mark.parametrize(("stock", "ours"), PAIRS.values(), ids=PAIRS.keys())


def prompts():
    batch = rows()
    batch["input_ids"][:, 6] = 1  # where a classifier reads
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def labels_of(name: str) -> dict[str, torch.Tensor]:
    one_each = torch.tensor([0, 1, 1])
    return {
        "ForConditionalGeneration": {"labels": rows()["labels"]},
        "ForSequenceClassification": {"labels": one_each},
        "ForTokenClassification": {"labels": torch.arange(450).view(3, 150) % 2},
        "ForQuestionAnswering": {"start_positions": one_each, "end_positions": one_each + 1},
    }.get(name, {})


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labels"])
def test_keys_and_places_of_outputs(name, labelled):
    """In evaluation, with the configuration's defaults; heads in the form of the stock class."""
    stock = PAIRS[name][0](T5Config(**SIZES)).eval()
    ours = fat5_like(stock, PAIRS[name][1])
    given = prompts() | (labels_of(name) if labelled else {})
    if name == "Model" or (name == "ForConditionalGeneration" and not labelled):
        given["decoder_input_ids"] = torch.randint(2, 99, (3, 9))
    want, got = stock(**given), ours(**given)
    assert list(got.keys()) == list(want.keys())
    want, got = stock(**given, return_dict=False), ours(**given, return_dict=False)
    assert [type(x) for x in got] == [type(x) for x in want]
    for one, other in zip(got, want):
        if isinstance(other, torch.Tensor) and other.shape != (3, 150, 32):  # states at padding
            assert difference(one, other) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("how", ["fat5", "accelerated", "left", "alibi"])
def test_gradients_of_hidden_states(how):
    """Those that are returned are those the loss was made of."""
    model, batch = t5_v1_1(), rows("left" if how == "left" else "right")
    if how == "accelerated":
        fat5.accelerate(model)
    elif how == "alibi":
        model = FAT5ForConditionalGeneration(fat5.FAT5Config(**SIZES, position_encoding="alibi"))
    else:
        model = fat5_like(model)
    out = model(**batch, output_hidden_states=True)
    states = [*out.encoder_hidden_states, *out.decoder_hidden_states]
    for state in states:
        state.retain_grad()
    out.loss.backward()
    assert len(states) == 2 + SIZES["num_layers"] + SIZES["num_decoder_layers"]
    assert all(state.grad is not None and state.grad.any() for state in states)
    assert difference(model(**batch).loss[None], out.loss[None]) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("chosen", [[0, 2], [-1], [1, 9], 2])
def test_chosen_hidden_states(chosen, accelerated):
    stock, batch = t5_v1_1().eval(), rows()
    ours = fat5.accelerate(copy.deepcopy(stock)) if accelerated else fat5_like(stock)
    want, got = (model(**batch, output_hidden_states=chosen) for model in (stock, ours))
    kept = {"encoder_hidden_states": batch["attention_mask"].bool(), "decoder_hidden_states": slice(None)}
    for name, seen in kept.items():
        assert [x is None for x in got[name]] == [x is None for x in want[name]]
        for one, other in zip(got[name], want[name]):
            assert other is None or difference(one[seen], other[seen]) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("family", [t5_v1_1, umt5])
@pytest.mark.parametrize("cached", [False, True], ids=["whole", "cached"])
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_a_decoder_mask_of_each_query_and_key(kind, cached, family):
    """Taken as it is, without causality of its own."""
    stock = family().eval()
    stock.set_attn_implementation("eager" if kind == "added" else "sdpa")
    ours = fat5_like(stock)
    mask = torch.rand(3, 1, 9, 9) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    if kind == "added":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    given = prompts() | {"decoder_input_ids": torch.randint(2, 99, (3, 9)), "use_cache": cached}
    want, got = (model(**given, decoder_attention_mask=mask).logits for model in (stock, ours))
    assert difference(want, stock(**given).logits) > 10 * LOGITS_TOLERANCE
    assert difference(got, want) <= LOGITS_TOLERANCE


@EACH_PAIR
def test_what_a_class_says_of_itself(stock, ours):
    models = [stock(T5Config(**SIZES)), ours(fat5.FAT5Config(**SIZES, head_form="encoder-decoder"))]
    assert models[1]._tied_weights_keys == models[0]._tied_weights_keys
    assert models[1].all_tied_weights_keys == models[0].all_tied_weights_keys
    assert models[1].get_expanded_tied_weights_keys(True) == models[0].get_expanded_tied_weights_keys(True)
    assert set(models[1].all_tied_weights_keys) <= dict(models[1].named_parameters(remove_duplicate=False)).keys()
    labels = torch.tensor([[5, 6, -100], [7, -100, -100]])
    assert torch.equal(models[1]._shift_right(labels), models[0]._shift_right(labels))
    for model in models:
        assert model._can_compile_fullgraph
        for modality in ("image", "audio"):
            assert model.get_encoder(modality=modality) is model
        holder = getattr(model, "transformer", model)
        assert model.get_encoder() is holder.encoder


def test_a_static_cache_compiles_without_a_break():
    stock, given = t5_v1_1().eval(), prompts()
    how = CompileConfig(fullgraph=True, backend="eager")
    how._compile_all_devices = True
    written = fat5_like(stock).generate(**given, max_new_tokens=4, cache_implementation="static", compile_config=how)
    assert torch.equal(written, stock.generate(**given, max_new_tokens=4))
