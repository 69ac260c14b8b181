"""fat5.accelerate: the stock model's logits, losses, gradients and tokens, in place and undoable."""

import copy
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    LongT5Config,
    LongT5ForConditionalGeneration,
    MT5ForTokenClassification,
    T5Config,
    T5EncoderModel,
    T5Model,
    UMT5EncoderModel,
    UMT5ForSequenceClassification,
)

import fat5
from fat5.errors import FAT5Error
from fat5.model.padding import Padding
from fat5.ops import attention as real_attention
from pairwise import pairwise
from stock import (
    ENCODERS,
    EVERY_FAMILY,
    FAMILIES,
    GRADIENT_TOLERANCE,
    LOGITS_TOLERANCE,
    SIZES,
    difference,
    gradient_difference,
    rows,
    t5_v1_1,
)

LOSSES = {"logits": False, "fused-loss": True}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "sample": {"do_sample": True, "top_k": 20},
}


def pair(model: Any, **how: Any) -> tuple[Any, Any]:
    """The model untouched, and its accelerated copy."""
    return model, fat5.accelerate(copy.deepcopy(model), **how)


def prompts(side: str = "right") -> dict[str, torch.Tensor]:
    return {key: value for key, value in rows(side).items() if key != "labels"}


def holes(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    batch["attention_mask"][0, 20:40] = batch["attention_mask"][1, 3] = 0
    return batch


@pairwise(2, family=FAMILIES, mask=["right", "left", "holes"], fused_loss=LOSSES)
def test_losses_and_gradients(family, mask, fused_loss):
    stock, fast = pair(family(), fused_loss=fused_loss)
    batch = holes(rows()) if mask == "holes" else rows(mask)
    want, got = stock(**batch), fast(**batch)
    assert difference(got.loss[None], want.loss[None]) <= LOGITS_TOLERANCE
    assert (got.logits is None) == fused_loss
    if not fused_loss:
        assert difference(got.logits, want.logits) <= LOGITS_TOLERANCE
    want.loss.backward()
    got.loss.backward()
    assert gradient_difference(stock, fast) <= GRADIENT_TOLERANCE


@pairwise(2, family=FAMILIES, reentrant={"plain": False, "reentrant": True}, fused_loss=LOSSES)
def test_gradient_checkpointing(family, reentrant, fused_loss):
    stock, fast = pair(family(), fused_loss=fused_loss)
    batch = rows()
    stock(**batch).loss.backward()
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fast(**batch).loss.backward()
    assert gradient_difference(stock, fast) <= GRADIENT_TOLERANCE


COMPILED = [
    pytest.param(family, fused_loss, id=f"{name}{'-fused-loss' if fused_loss else ''}", marks=marks)
    for name, family in (FAMILIES | ENCODERS).items()
    for fused_loss in (False, True)
    for marks in [[] if (name, fused_loss) in (("v1.1", True), ("umT5 encoder", False)) else [pytest.mark.slow]]
    if not (fused_loss and name in ENCODERS)
]


@pytest.mark.parametrize(("family", "fused_loss"), COMPILED)
def test_compiles_whole_and_once(family, fused_loss):
    """No graph break, and one graph for every mask of a shape."""
    stock, fast = pair(family(num_layers=1, num_decoder_layers=1), fused_loss=fused_loss)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    for batch in (rows(), rows("left"), holes(rows())):
        if family in ENCODERS.values():
            batch.pop("labels")
        want, got = stock(**batch), compiled(**batch)
        kept = batch["attention_mask"].bool()
        loss, wanted = (
            (out.loss if "labels" in batch else out.last_hidden_state[kept][:, :5].sum()) for out in (got, want)
        )
        assert difference(loss[None], wanted[None]) <= LOGITS_TOLERANCE
        for model, total in ((stock, wanted), (fast, loss)):
            model.zero_grad()
            total.backward()
        assert gradient_difference(stock, fast) <= GRADIENT_TOLERANCE
    assert counter.frame_count == 1


def test_a_mask_is_read_once_for_encoder_and_decoder(monkeypatch):
    """Reading it waits for the device: a decoder that did would wait for the encoder."""
    read = []
    plain = Padding._read
    monkeypatch.setattr(Padding, "_read", lambda *asked: read.append(1) or plain(*asked))
    fast, batch = fat5.accelerate(t5_v1_1()), rows()
    first = fast(**batch).loss
    assert len(read) == 1
    batch["attention_mask"][0, 40:] = 0  # in place: another mask
    assert fast(**batch).loss != first
    assert len(read) == 2


def test_a_mask_of_inference_mode_trains_too():
    fast, batch = fat5.accelerate(t5_v1_1()), rows()
    with torch.inference_mode():
        want = fast(**batch).loss
    loss = fast(**batch).loss
    loss.backward()
    assert loss == want


def test_dropout_is_drawn():
    fast = fat5.accelerate(t5_v1_1(dropout_rate=0.2))
    batch = rows()
    torch.manual_seed(1)
    first = fast(**batch).loss
    again = fast(**batch).loss
    torch.manual_seed(1)
    assert first == fast(**batch).loss != again
    assert fast.eval()(**batch).loss == fast(**batch).loss


@pairwise(2, family=FAMILIES, side=["right", "left"], how=WAYS)
def test_generate_writes_the_same_tokens(family, side, how):
    batch, written = prompts(side), []
    for model in pair(family().eval()):
        torch.manual_seed(5)
        written.append(model.generate(**batch, max_new_tokens=20, **how))
    assert torch.equal(*written)


@EVERY_FAMILY
@pytest.mark.parametrize("implementation", ["accelerate", "fat5"])
def test_caches(family, implementation):
    stock = family().eval()
    fast = copy.deepcopy(stock)
    if implementation == "accelerate":
        fat5.accelerate(fast)
    else:
        fast.set_attn_implementation("fat5")
    batch, start = prompts(), torch.tensor([[0, 5, 9, 4]] * 3)
    mask = torch.ones_like(start)
    mask[0, 1] = 0
    for how in (
        {"cache_implementation": "static", "disable_compile": True},
        {"decoder_input_ids": start},
        {"decoder_input_ids": start, "decoder_attention_mask": mask},
        {"decoder_input_ids": start, "cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
    ):
        want, got = (model.generate(**batch, max_new_tokens=10, **how) for model in (stock, fast))
        assert torch.equal(got, want), how
    caches = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2)]
    for part in (start[:, :2], start[:, 2:]):
        want, got = (
            model(**batch, decoder_input_ids=part, past_key_values=cache).logits
            for model, cache in zip((stock, fast), caches)
        )
        assert difference(got, want) <= LOGITS_TOLERANCE


@EVERY_FAMILY
def test_attn_implementation(family):
    stock = family()
    fast = copy.deepcopy(stock)
    fast.set_attn_implementation("fat5")
    for batch in (rows(), rows("left"), holes(rows())):
        stock.zero_grad()
        fast.zero_grad()
        want, got = stock(**batch), fast(**batch)
        assert difference(got.logits, want.logits) <= LOGITS_TOLERANCE
        want.loss.backward()
        got.loss.backward()
        assert gradient_difference(stock, fast) <= GRADIENT_TOLERANCE


def test_attn_implementation_from_pretrained(tmp_path):
    stock = t5_v1_1().eval()
    stock.save_pretrained(tmp_path)
    fast = type(stock).from_pretrained(tmp_path, attn_implementation="fat5")
    assert difference(fast(**rows()).logits, stock(**rows()).logits) > 0.1  # other rows: the comparison can fail
    batch = rows()
    assert difference(fast(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE


@pytest.mark.parametrize("cls", [T5EncoderModel, UMT5EncoderModel])
def test_embeddings_into_an_encoder(cls):
    """Masks of encoders: test_masks.py."""
    stock, fast = pair(cls(cls.config_class(**SIZES)).eval())
    batch = holes(prompts())
    kept = batch["attention_mask"].bool()
    batch["inputs_embeds"] = stock.shared(batch.pop("input_ids"))
    want, got = stock(**batch, return_dict=False), fast(**batch, return_dict=False)
    assert isinstance(got, tuple)
    assert difference(got[0][kept], want[0][kept]) <= LOGITS_TOLERANCE


@pytest.mark.parametrize(
    ("cls", "labels"),
    [
        (UMT5ForSequenceClassification, {"labels": torch.tensor([0, 1, 1])}),
        (MT5ForTokenClassification, {"labels": torch.arange(450).view(3, 150) % 3 // 2}),
        (T5Model, {"decoder_input_ids": 2 + torch.arange(27).view(3, 9)}),
    ],
)  # fmt: skip
def test_heads(cls, labels):
    """Those of T5 itself: test_masks.py."""
    stock, fast = pair(cls(cls.config_class(**SIZES, classifier_dropout=0.0)).train())
    batch = prompts()
    # Sequence classification reads the end token.
    batch["input_ids"][:, 6] = 1
    if "labels" in labels and labels["labels"].dim() == 2:
        labels = {"labels": labels["labels"].masked_fill(batch["attention_mask"] == 0, -100)}
    want, got = stock(**batch, **labels), fast(**batch, **labels)
    if "loss" in want:
        assert difference(got.loss[None], want.loss[None]) <= LOGITS_TOLERANCE
        want.loss.backward()
        got.loss.backward()
        assert gradient_difference(stock, fast) <= GRADIENT_TOLERANCE
    else:
        assert difference(got.last_hidden_state, want.last_hidden_state) <= LOGITS_TOLERANCE


@EVERY_FAMILY
def test_states_and_weights_on_request(family):
    stock = family().eval()
    stock.set_attn_implementation("eager")
    stock, fast = pair(stock)
    batch = rows()
    want, got = (model(**batch, output_hidden_states=True, output_attentions=True) for model in (stock, fast))
    for name in ("encoder_hidden_states", "decoder_hidden_states", "encoder_attentions", "cross_attentions"):
        for one, other in zip(got[name], want[name], strict=True):
            assert difference(one, other) <= LOGITS_TOLERANCE


def test_no_square_bias_is_made(monkeypatch):
    from fat5 import ops

    seen = []

    def attention(*args: Any, **how: Any) -> torch.Tensor:
        seen.append(how.get("bias"))
        return real_attention(*args, **how)

    monkeypatch.setattr(ops, "attention", attention)
    fast = fat5.accelerate(t5_v1_1())
    fast(**rows()).loss.backward()
    assert len(seen) == SIZES["num_layers"] + 2 * SIZES["num_decoder_layers"]
    assert sum(bias is None for bias in seen) == SIZES["num_decoder_layers"]
    assert all(bias is None or isinstance(bias, ops.RelativeBias) for bias in seen)


def test_state_dict_and_saving(tmp_path):
    stock, fast = pair(t5_v1_1().eval(), fused_loss=True)
    assert list(fast.state_dict()) == list(stock.state_dict())
    assert isinstance(fast, type(stock))
    fast.save_pretrained(tmp_path)
    assert '"T5ForConditionalGeneration"' in (tmp_path / "config.json").read_text()
    again, batch = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), rows()
    assert type(again) is type(stock)
    torch.testing.assert_close(again(**batch).logits, stock(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_what_was_saved_needs_no_fat5(tmp_path):
    stock, fast = pair(t5_v1_1().eval(), fused_loss=True)
    batch = rows()
    fast.save_pretrained(tmp_path)
    torch.save({"batch": batch, "logits": stock(**batch).logits}, tmp_path / "expected.pt")
    script = f"""
import sys, torch
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path)!r})
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
torch.testing.assert_close(model(**expected["batch"]).logits, expected["logits"], rtol=1e-5, atol=1e-5)
assert type(model).__name__ == "T5ForConditionalGeneration" and "fat5" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def classes(model: Any) -> list[type]:
    return [type(module) for module in model.modules()]


def test_undo_and_doing_it_twice():
    model = t5_v1_1()
    before = classes(model)
    assert fat5.accelerate(model, undo=True) is model
    assert fat5.accelerate(model, fused_loss=True) is model
    fused = classes(model)
    assert fused != before
    fat5.accelerate(model, fused_loss=True)
    assert classes(model) == fused
    fat5.accelerate(model)
    assert type(model) is before[0]
    assert model(**rows()).logits is not None
    fat5.accelerate(model, undo=True)
    assert classes(model) == before


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_copies_and_pickles_stay_accelerated(family):
    stock, fast = pair(family().eval(), fused_loss=True)
    batch = rows()
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert classes(other) == classes(fast)
        assert difference(other(**batch).logits, stock(**batch).logits) <= LOGITS_TOLERANCE
        fat5.accelerate(other, undo=True)
        assert classes(other) == classes(stock)


def test_inside_another_module():
    holder = torch.nn.ModuleDict({"text": T5EncoderModel(T5Config(**SIZES)), "other": torch.nn.Linear(2, 2)})
    fat5.accelerate(holder)
    assert type(holder["text"].encoder).__module__ == "fat5.stock.accelerated"


@pytest.mark.parametrize(
    "model",
    [
        torch.nn.Linear(2, 2),
        None,
        LongT5ForConditionalGeneration(LongT5Config(**SIZES)),
        fat5.FAT5EncoderModel(fat5.FAT5Config(**SIZES)),
    ],
    ids=["Linear", "None", "LongT5", "FAT5"],
)
def test_unsupported_models_are_refused(model):
    with pytest.raises(FAT5Error, match=r"^fat5.accelerate: .* holds no T5, mT5 or umT5"):
        fat5.accelerate(model)


def test_replaced_forwards_are_refused():
    model = t5_v1_1()
    attention = model.encoder.block[1].layer[0].SelfAttention
    attention.forward = attention.forward
    before = classes(model)
    with pytest.raises(FAT5Error, match="the forward of a T5Attention was replaced"):
        fat5.accelerate(model)
    assert classes(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_stock(dtype):
    truth = t5_v1_1().eval()
    batch = rows()
    want = truth.double()(**batch).logits
    errors = [difference(model(**batch).logits.double(), want) for model in pair(copy.deepcopy(truth).to(dtype))]
    # Twice the error of plain PyTorch in the same precision is the house's rule.
    assert errors[1] <= 2 * errors[0]


def test_autocast_trains():
    stock, fast = pair(t5_v1_1())
    batch = rows()
    losses = []
    for model in (stock, fast):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(**batch).loss)
        losses[-1].backward()
    # bfloat16 keeps three digits.
    assert difference(losses[1][None], losses[0][None]) <= 1e-2


def test_a_trainer_trains(tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    fast = fat5.accelerate(t5_v1_1(), fused_loss=True)
    batch = rows()
    data = [{name: values[row] for name, values in batch.items()} for row in range(3)]
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=3, report_to=[], use_cpu=True, learning_rate=1e-2,
        save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    before = fast.eval()(**batch).loss.item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Seq2SeqTrainer(fast, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    assert after < before
