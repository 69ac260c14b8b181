"""The encoder and the heads: against the stock class of the same form, packed, from seq2seq checkpoints, and back."""

import json
import logging

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import MT5Config, T5Config, UMT5Config

import fat5
from fat5.errors import CheckpointError, DataError
from fat5.model import FAT5Config
from fat5.model.heads import _mean_of_tokens
from pairwise import pairwise
from stock import (
    EVERY_FAMILY,
    GRADIENT_TOLERANCE,
    LOGITS_TOLERANCE,
    SIZES,
    difference,
    fat5_like,
    gradient_difference,
    rows,
    starts,
    t5_v1_1,
)

CONFIGS = {"T5": T5Config, "MT5": MT5Config, "UMT5": UMT5Config}
EVERY_PREFIX = pytest.mark.parametrize("prefix", CONFIGS)
HEADS = ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
AUTO = {
    "EncoderModel": transformers.AutoModelForTextEncoding,
    "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "ForTokenClassification": transformers.AutoModelForTokenClassification,
    "ForQuestionAnswering": transformers.AutoModelForQuestionAnswering,
}


def stock_head(prefix, kind, labels):
    model = getattr(transformers, f"{prefix}{kind}")(CONFIGS[prefix](**SIZES, num_labels=labels))
    for parameter in model.parameters():  # biases that start at zero would hide
        if parameter.dim() == 1 and not parameter.any():
            torch.nn.init.normal_(parameter)
    return model.eval()


def source(side="right"):
    batch = rows(side)
    batch["input_ids"][batch["attention_mask"].bool()] += (
        batch["input_ids"][batch["attention_mask"].bool()] == 1
    ).long()
    last = 150 - 1 - batch["attention_mask"].flip(1).argmax(dim=1)
    batch["input_ids"][torch.arange(3), last] = 1
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def packed(batch):
    documents = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    ids = torch.cat([*documents, torch.zeros(4, dtype=torch.long)])
    return {"input_ids": ids, "cu_seqlens": starts(documents), "max_seqlen": 150}


@EVERY_PREFIX
def test_sequence_classification_with_a_decoder(prefix, tmp_path):
    stock, batch = stock_head(prefix, "ForSequenceClassification", 3), source() | {"labels": torch.tensor([0, 2, 1])}
    ours = fat5_like(stock, fat5.FAT5ForSequenceClassification)
    same(stock, ours, batch, ("logits", "loss"), tmp_path)


@EVERY_PREFIX
def test_token_classification(prefix, tmp_path):
    stock, batch = stock_head(prefix, "ForTokenClassification", 5), source()
    labels = torch.randint(0, 5, (3, 150)).masked_fill(batch["attention_mask"] == 0, -100)
    ours = fat5_like(stock, fat5.FAT5ForTokenClassification)
    same(stock, ours, batch | {"labels": labels}, ("logits", "loss"), tmp_path)
    kept = batch["attention_mask"].bool()
    got = ours(**packed(batch), labels=torch.cat([labels[kept], torch.full((4,), -100)]))
    want = stock(**batch, labels=labels)
    assert difference(got.logits[: kept.sum()], want.logits[kept]) <= LOGITS_TOLERANCE
    torch.testing.assert_close(got.loss, want.loss)


@EVERY_PREFIX
def test_question_answering(prefix, tmp_path):
    stock, batch = stock_head(prefix, "ForQuestionAnswering", 2), source()
    ours = fat5_like(stock, fat5.FAT5ForQuestionAnswering)
    places = {"start_positions": torch.tensor([3, 80, 500]), "end_positions": torch.tensor([[9], [88], [500]])}
    same(stock, ours, batch | places, ("start_logits", "end_logits", "loss"), tmp_path)


def same(stock, ours, batch, names, folder):
    """Outputs at the tokens, gradients of every parameter, and the stock class from our folder."""
    kept = batch["attention_mask"].bool()
    want, got = stock(**batch), ours(**batch)
    for name in names:
        a, b = getattr(got, name), getattr(want, name)
        if a.shape[:2] == kept.shape:
            a, b = a[kept], b[kept]
        assert difference(a[None], b[None]) <= LOGITS_TOLERANCE, name
    want.loss.backward()
    got.loss.backward()
    if hasattr(stock, "qa_outputs"):  # a softmax does not see a constant: this gradient is rounding and nothing else
        stock.qa_outputs.bias.grad = ours.qa_outputs.bias.grad = torch.ones(2)
    assert gradient_difference(stock, ours) <= GRADIENT_TOLERANCE
    ours.save_pretrained(folder)
    back, info = type(stock).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(getattr(back(**batch), names[0]), getattr(want, names[0]))


@EVERY_FAMILY
@pytest.mark.parametrize("kind", ["EncoderModel", *HEADS])
def test_from_a_seq2seq_checkpoint(family, kind, tmp_path, caplog, capfd):
    stock = family()
    stock.save_pretrained(tmp_path)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        ours = getattr(fat5, f"FAT5{kind}").from_pretrained(tmp_path).eval()
    told = [record.getMessage() for record in caplog.records]
    assert [line for line in told if "newly initialised" in line] == told
    assert len(told) == (0 if kind == "EncoderModel" else 1)
    assert "decoder" not in capfd.readouterr().err
    body = getattr(ours, "transformer", ours)
    batch = source()
    kept = batch["attention_mask"].bool()
    want = stock.encoder(**batch).last_hidden_state[kept]
    assert difference(body.encoder(**batch).last_hidden_state[kept], want) <= LOGITS_TOLERANCE


@EVERY_FAMILY
@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification", "ForQuestionAnswering"])
def test_with_a_decoder_from_a_seq2seq_checkpoint(family, kind, tmp_path):
    """On request; what the stock class makes of the same folder, but for the head, which is new in both."""
    family().save_pretrained(tmp_path)
    cls = getattr(fat5.model, f"FAT5{kind}")
    ours = cls.from_pretrained(tmp_path, head_form="encoder-decoder").eval()
    prefix = {"mt5": "MT5", "umt5": "UMT5"}.get(ours.config.family, "T5")
    stock = getattr(transformers, f"{prefix}{kind}").from_pretrained(tmp_path).eval()
    heads = {name: parameter for name, parameter in stock.named_parameters() if name.startswith(cls._head_weights)}
    assert bool(heads) == (kind != "Model")
    for name, parameter in heads.items():
        ours.get_parameter(name).data.copy_(parameter.data)
    batch = source()
    given = batch | ({"decoder_input_ids": batch["input_ids"]} if kind == "Model" else {})
    kept = batch["attention_mask"].bool()
    want, got = stock(**given)[0], ours(**given)[0]
    at = kept if want.shape[:2] == kept.shape else slice(None)
    assert difference(got[at], want[at]) <= LOGITS_TOLERANCE


def test_a_head_of_another_size_is_begun_anew_on_request(tmp_path, caplog):
    fat5.FAT5ForTokenClassification(FAT5Config(**SIZES, num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"classifier\..* ignore_mismatched_sizes=True initialises a new head"):
        fat5.FAT5ForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    with caplog.at_level(logging.WARNING):
        ours = fat5.FAT5ForTokenClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    [told] = [record.getMessage() for record in caplog.records]
    assert told == (
        "FAT5ForTokenClassification: classifier.bias ((5,) here, (3,) in the checkpoint), classifier.weight ((5, 32) "
        "here, (3, 32) in the checkpoint) are newly initialised; train them before use"
    )
    assert ours(**source()).logits.shape[-1] == 5


@pairwise(2, kind=["EncoderModel", *HEADS], form=["encoder", "encoder-decoder"], position_encoding=["t5", "alibi"])
def test_round_trip(kind, form, position_encoding, tmp_path):
    cls = getattr(fat5, f"FAT5{kind}")
    config = FAT5Config(**SIZES, num_labels=2, head_form=form, position_encoding=position_encoding)
    ours, batch = cls(config).eval(), source()
    ours.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path).eval()
    assert all(torch.equal(*pair) for pair in zip(ours(**batch).to_tuple()[:1], again(**batch).to_tuple()[:1]))
    family = json.loads((tmp_path / "config.json").read_text())["model_type"]
    stock_computes_it = kind in ("EncoderModel", "ForTokenClassification") or form == "encoder-decoder"
    assert family == ("t5" if stock_computes_it and position_encoding == "t5" else "fat5")
    if family == "fat5":
        assert type(AUTO[kind].from_pretrained(tmp_path)) is cls


@pytest.mark.parametrize("labels", [1, 3])
def test_pooled_classification_is_the_mean_packed_or_padded(labels):
    ours = fat5.FAT5ForSequenceClassification(FAT5Config(**SIZES, num_labels=labels)).eval()
    assert not any("decoder" in name for name, _ in ours.named_parameters())
    right, left = source(), source("left")
    left["input_ids"] = torch.zeros_like(right["input_ids"])
    left["input_ids"][left["attention_mask"].bool()] = right["input_ids"][right["attention_mask"].bool()]
    targets = torch.tensor([0.5, 1.0, -2.0]) if labels == 1 else torch.tensor([0, 1, 2])
    want = ours(**right, labels=targets)
    hidden = ours.transformer(**right).last_hidden_state
    mean = torch.stack([x[mask.bool()].mean(dim=0) for x, mask in zip(hidden, right["attention_mask"])])
    torch.testing.assert_close(want.logits, ours.classification_head(mean))
    torch.testing.assert_close(ours(**left).logits, want.logits)
    torch.testing.assert_close(ours(**packed(right)).logits[:3], want.logits)
    loss = torch.nn.functional.mse_loss if labels == 1 else torch.nn.functional.cross_entropy
    torch.testing.assert_close(want.loss, loss(want.logits.squeeze(-1) if labels == 1 else want.logits, targets))
    want.loss.backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())


def test_several_labels_at_once():
    ours, batch = fat5.FAT5ForSequenceClassification(FAT5Config(**SIZES, num_labels=4)).eval(), source()
    targets = torch.tensor([[1.0, 0, 0, 1]] * 3)
    got = ours(**batch, labels=targets)
    torch.testing.assert_close(got.loss, torch.nn.functional.binary_cross_entropy_with_logits(got.logits, targets))


EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def in_dtype(cls, form, dtype, labels=2, **options):
    return cls(FAT5Config(**SIZES, num_labels=labels, head_form=form, **options)).to(dtype).eval()


@EVERY_DTYPE
@pytest.mark.parametrize("form", ["encoder", None])
def test_question_answering_packed(form, dtype):
    """The padded form's logits at every token of every document."""
    ours, batch = in_dtype(fat5.FAT5ForQuestionAnswering, form, dtype), source()
    kept = batch["attention_mask"].bool()
    got, want = ours(**packed(batch)), ours(**batch)
    for name in ("start_logits", "end_logits"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == dtype
        assert a.shape == (kept.sum() + 4,)
        assert difference(a[: kept.sum()], b[kept]) <= LOGITS_TOLERANCE


@pairwise(
    2,
    form=["encoder", "encoder-eos", "encoder-decoder"],
    position_encoding=["t5", "rope"],
    dtype=[torch.float32, torch.float64],
)
def test_sequence_classification_packed(form, position_encoding, dtype):
    """The padded form's logits, loss and gradients; an empty document is a vector of zeros."""
    ours = in_dtype(fat5.FAT5ForSequenceClassification, form, dtype, 3, position_encoding=position_encoding)
    batch, gradients = source(), []
    labels = torch.tensor([0, 2, 1, -100, -100])
    for given in (batch | {"labels": labels[:3]}, packed(batch) | {"labels": labels}):
        ours.zero_grad()
        got = ours(**given)
        got.loss.backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters()])
        if "cu_seqlens" not in given:
            want = got
    assert difference(got.logits[:3], want.logits) <= LOGITS_TOLERANCE
    torch.testing.assert_close(got.logits[3:], ours.classification_head(torch.zeros(2, 32, dtype=dtype)))
    torch.testing.assert_close(got.loss, want.loss)
    assert max(difference(b, a) for a, b in zip(*gradients)) <= GRADIENT_TOLERANCE


def test_a_mean_sees_its_own_document_only():
    """In float32 under autocast too, whatever lies behind the last document."""
    starts_of, hidden = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.randn(9, 8)
    hidden[7:] = float("nan")
    with torch.autocast("cpu", torch.bfloat16):
        got = _mean_of_tokens(hidden, None, starts_of)
    torch.testing.assert_close(got, torch.stack([hidden[:3].mean(0), torch.zeros(8), hidden[3:7].mean(0)]))


COMPILED = [
    ("ForSequenceClassification", "encoder-eos"), ("ForTokenClassification", None),
    ("ForQuestionAnswering", "encoder-decoder"),
]  # fmt: skip
COMPILED_SLOWLY = [
    ("ForSequenceClassification", "encoder"), ("ForSequenceClassification", "encoder-decoder"),
    ("ForQuestionAnswering", "encoder"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "form"), [*COMPILED, *(pytest.param(*case, marks=pytest.mark.slow) for case in COMPILED_SLOWLY)]
)
def test_packed_heads_compile_whole_and_once(kind, form):
    """No graph break, and one compilation for every batch of equal budget."""
    config = FAT5Config(**SIZES | {"num_layers": 1, "num_decoder_layers": 1}, num_labels=2, head_form=form)
    ours, batch = getattr(fat5, f"FAT5{kind}")(config).eval(), packed(source())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for ends in ([0, 150, 240, 247, 247, 247], [0, 90, 240, 247, 247, 251], [0, 7, 157, 157, 200, 247]):
        ids = batch["input_ids"].clone()
        ids[torch.tensor(ends[1:]) - 1] = 1
        given = {"input_ids": ids, "cu_seqlens": torch.tensor(ends, dtype=torch.int32), "max_seqlen": 150}
        torch.testing.assert_close(compiled(**given)[0], ours(**given)[0])
    assert counter.frame_count == 1


def test_gradient_checkpointing_of_a_head():
    ours, batch = fat5.FAT5ForTokenClassification(FAT5Config(**SIZES, num_labels=2)).train(), source()
    labels = torch.zeros(3, 150, dtype=torch.long)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
            assert all(block.gradient_checkpointing for block in ours.transformer.encoder.block)
        ours.zero_grad()
        ours(**batch, labels=labels).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in ours.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_texts_without_eos_are_refused():
    ours = fat5.FAT5ForSequenceClassification(FAT5Config(**SIZES, head_form="encoder-decoder"))
    with pytest.raises(DataError, match="EOS"):
        ours(input_ids=torch.randint(2, 9, (2, 5)))


@pytest.mark.parametrize("form", ["encoder-eos", "encoder-decoder"])
def test_a_packed_document_without_eos_is_named(form):
    ours, given = in_dtype(fat5.FAT5ForSequenceClassification, form, torch.float32), packed(source())
    given["input_ids"][239] = 5
    with pytest.raises(DataError, match="document 1 does not end with EOS"):
        ours(**given)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("ForSequenceClassification", "decoder_input_ids"), ("ForQuestionAnswering", "max_seqlen"),
        ("ForQuestionAnswering", "decoder_max_seqlen"),
    ],
)  # fmt: skip
def test_what_a_form_cannot_serve_is_refused(kind, given):
    ours = getattr(fat5, f"FAT5{kind}")(FAT5Config(**SIZES))
    with pytest.raises(ValueError, match=f"^{given}"):
        ours(input_ids=torch.ones(2, 5, dtype=torch.long), **{given: torch.ones(2, 5, dtype=torch.long)})


@pytest.mark.parametrize("given", ["decoder_input_ids", "decoder_attention_mask", "attention_mask", "use_cache"])
@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_what_packed_documents_do_not_take_is_refused(kind, given):
    ours = in_dtype(getattr(fat5, f"FAT5{kind}"), "encoder-decoder", torch.float32)
    with pytest.raises(ValueError, match=f"^{given}: packed documents"):
        ours(**packed(source()), **{given: torch.ones(251, dtype=torch.long) if given != "use_cache" else True})


@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_packed_documents_need_a_bound(kind):
    ours = in_dtype(getattr(fat5, f"FAT5{kind}"), "encoder-decoder", torch.float32)
    with pytest.raises(ValueError, match=r"^max_seqlen: packed documents need it"):
        ours(**(packed(source()) | {"max_seqlen": None}))


def test_a_seq2seq_from_an_encoder_is_refused(tmp_path):
    stock_head("T5", "EncoderModel", 2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks .* decoder"):
        fat5.FAT5ForConditionalGeneration.from_pretrained(tmp_path)


def test_an_encoder_serves_where_a_stock_object_did(tmp_path):
    """As image generators call it: ids, attention_mask, index 0, dtype, device, to()."""
    t5_v1_1().save_pretrained(tmp_path)
    ours = fat5.FAT5EncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16).to("cpu")
    batch = source()
    hidden = ours(batch["input_ids"].to(ours.device), attention_mask=batch["attention_mask"])[0]
    assert hidden.dtype == ours.dtype == torch.bfloat16
    assert ours.config.d_model == hidden.shape[-1]
