"""The losses of heads on packed examples, against one example at a time in float64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fat5 import model as fat5_model
from fat5.data import BatchConfig
from fat5.model import FAT5Config
from fat5.tasks.finetune.examples import ExampleSet
from fat5.tasks.finetune.model import widen_new_head
from fat5.tasks.finetune.objective import HeadObjective

CLASSES = {
    "classification": "FAT5ForSequenceClassification",
    "regression": "FAT5ForSequenceClassification",
    "entities": "FAT5ForTokenClassification",
    "answers": "FAT5ForQuestionAnswering",
}
LABELS = 4
LENGTHS = [5, 1, 17, 30, 8, 2]
# float32 sums of a few hundred terms against float64.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


def model_of(kind, head_form="encoder"):
    torch.manual_seed(1)
    outputs = {"regression": 1, "answers": 2}.get(kind, LABELS)
    config = FAT5Config(
        vocab_size=128, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_decoder_layers=1, num_heads=2, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, classifier_dropout=0.0, num_labels=outputs,
        head_form=None if kind == "entities" else head_form,
    )  # fmt: skip
    model = getattr(fat5_model, CLASSES[kind])(config)
    with torch.no_grad():
        for weight in model.parameters():  # large enough that the examples' losses differ
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def examples_of(kind):
    rng = np.random.default_rng(0)
    inputs = [[*rng.integers(2, 128, length - 1).tolist(), 1] for length in LENGTHS]
    if kind == "regression":
        return ExampleSet.of(inputs, [[float(value)] for value in rng.normal(0, 3, 6)], [0] * 6, dtype=np.float32)
    if kind == "answers":
        targets = [sorted(rng.integers(0, length, 2).tolist()) for length in LENGTHS]
    elif kind == "entities":
        targets = [[*rng.choice([-100, 0, 1, 2, 3], length - 1).tolist(), -100] for length in LENGTHS]
    else:
        targets = [[label] for label in (0, 3, 1, 1, 2, 0)]
    return ExampleSet.of(inputs, targets, [0] * 6)


def batch_of(examples, indices):
    config = BatchConfig(max_tokens=128, encoder_tokens=128, decoder_tokens=128, packs_per_step=1, max_examples=8)
    return examples.batch(np.array(indices), config, 0)


def scores_alone(model, tokens):
    """The head's outputs for one unpacked row: (1, C), (L, C) or (L, 2)."""
    found = model(torch.from_numpy(tokens.astype(np.int64))[None])
    if "start_logits" in found:
        return torch.stack([found.start_logits[0], found.end_logits[0]], dim=-1)
    return found.logits.reshape(-1, found.logits.shape[-1])


def reference(model, examples, kind, weights, smoothing):
    """The sum of all losses, by the definitions: of a target y, weights w, smoothing e, and log-probabilities p, the
    loss is -(1 - e) w[y] p[y] - e/C Σ w[c] p[c].
    """
    total = torch.zeros((), dtype=torch.float64)
    for index in range(len(examples)):
        scores, target = scores_alone(model, examples.input(index)), examples.target(index).tolist()
        if kind == "regression":
            total = total + (scores[0, 0] - target[0]) ** 2
            continue
        rows = scores.T if kind == "answers" else scores
        for row, label in zip(rows, target, strict=True):
            if label == -100:
                continue
            log_shares = row - row.exp().sum().log()
            scale = torch.ones_like(row) if weights is None else torch.tensor(weights, dtype=torch.float64)
            spread = (scale * log_shares).sum() * smoothing / len(row)
            total = total - (1 - smoothing) * scale[label] * log_shares[label] - spread
    return total


CASES = [
    ("classification", "encoder", None, 0.0),
    ("classification", "encoder", [0.5, 1.0, 2.0, 3.0], 0.0),
    ("classification", "encoder", [0.5, 1.0, 2.0, 3.0], 0.2),
    ("classification", "encoder-decoder", None, 0.1),
    ("regression", "encoder", None, 0.0),
    ("regression", "encoder-decoder", None, 0.0),
    ("entities", "encoder", [0.5, 1.0, 2.0, 3.0], 0.1),
    ("answers", "encoder", None, 0.0),
    ("answers", "encoder-decoder", None, 0.0),
]


@pytest.mark.parametrize(("kind", "head_form", "weights", "smoothing"), CASES)
def test_loss_and_gradients_equal_those_of_examples_alone(kind, head_form, weights, smoothing):
    model, examples = model_of(kind, head_form), examples_of(kind)
    exact = copy.deepcopy(model).double()
    wanted = reference(exact, examples, kind, weights, smoothing)
    batch = batch_of(examples, [3, 0, 5, 1, 2, 4])
    objective = HeadObjective(model, kind, weights, smoothing)
    loss = objective(**batch.model_inputs(), num_items_in_batch=7).loss
    torch.testing.assert_close(loss.double(), wanted.detach() / 7, **TOLERANCE)
    loss.backward()
    (wanted / 7).backward()
    for (name, weight), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (weight.grad is None) == (other.grad is None), name
        if other.grad is not None:
            scale = other.grad.abs().max().clamp_min(1e-3)
            torch.testing.assert_close(weight.grad / scale, (other.grad / scale).float(), rtol=0, atol=1e-4, msg=name)
    assert nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None]) > 1e-2
    mean = objective(**batch.model_inputs()).loss
    torch.testing.assert_close(mean.double(), wanted.detach() / batch.num_items, **TOLERANCE)


@pytest.mark.parametrize("kind", CLASSES)
def test_micro_batches_add_up_to_one_batch(kind):
    model, examples = model_of(kind), examples_of(kind)
    objective = HeadObjective(model, kind)
    whole = batch_of(examples, range(6))
    losses, gradients = [], []
    for parts in ([range(6)], [[5, 0], [1], [4, 3, 2]]):
        model.zero_grad()
        batches = [batch_of(examples, part) for part in parts]
        found = [objective(**batch.model_inputs(), num_items_in_batch=whole.num_items).loss for batch in batches]
        sum(found).backward()
        losses.append(sum(found).detach())
        gradients.append(torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None]))
    torch.testing.assert_close(losses[1], losses[0], **TOLERANCE)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("kind", CLASSES)
def test_scores_of_each_target_are_plain(kind):
    model, examples = model_of(kind), examples_of(kind)
    weights, smoothing = ([0.5, 1.0, 2.0, 3.0], 0.2) if kind in ("classification", "entities") else (None, 0.0)
    batch = batch_of(examples, range(6))
    output = HeadObjective(model, kind, weights, smoothing)(**batch.model_inputs(), per_token=True)
    assert output.token_loss.shape == output.token_correct.shape == batch.labels.shape
    counted = batch.labels != -100
    assert (output.token_loss[~counted] == 0).all()
    assert not output.token_correct[~counted].any()
    wanted = reference(copy.deepcopy(model).double(), examples, kind, None, 0.0)
    torch.testing.assert_close(output.token_loss.double().sum(), wanted.detach(), **TOLERANCE)
    if kind == "regression":
        assert not output.token_correct.any()
        return
    right = []
    for index in range(6):
        scores = scores_alone(model, examples.input(index))
        right += (scores.T if kind == "answers" else scores).argmax(dim=-1).tolist()
    hits = torch.tensor(right) == torch.from_numpy(examples.targets)
    assert output.token_correct[: len(right)].tolist() == hits.tolist()


@pytest.mark.parametrize(
    ("kind", "form", "head"),
    [
        ("classification", "encoder", "classification_head.dense"),
        ("classification", "encoder-decoder", "classification_head.dense"),
        ("entities", "encoder", "classifier"),
        ("answers", "encoder", "qa_outputs"),
    ],
)
def test_a_new_head_reads_small_states_as_large_ones(kind, form, head):
    """A head of the checkpoint's own stays; a new one takes the size of the last norm's weight, which it reads."""
    model = model_of(kind, form)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    read = "decoder" if form == "encoder-decoder" else "encoder"
    last = next(module for name, module in model.named_modules() if name.endswith(f"{read}.final_layer_norm"))
    torch.nn.init.constant_(last.weight, 0.25)
    widen_new_head(model, [])
    assert torch.equal(model.state_dict()[f"{head}.weight"], before[f"{head}.weight"])
    widen_new_head(model, list(before))
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"{head}.weight", *(name for name in before if name.endswith(f"{read}.final_layer_norm.weight"))}
    torch.testing.assert_close(model.state_dict()[f"{head}.weight"], 4 * before[f"{head}.weight"])
