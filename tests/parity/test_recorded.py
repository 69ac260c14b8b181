"""Graphs of our classes, recorded by torch.export, torch.jit and the ONNX exporter, hold for batches not yet seen."""

import copy
import io
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fat5
from fat5.ops.attention.bias import _bucket_lookup
from stock import LOGITS_TOLERANCE, SIZES, difference, fat5_like, rows, t5_v1_1

POSITIONS = pytest.mark.parametrize("positions", ["t5", "alibi", "rope", "fire"])
FREE = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


def batch(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(2, 99, mask.shape) * mask, "attention_mask": mask}


def encoder(positions: str) -> Any:
    options: dict[str, Any] = SIZES | {"feed_forward_proj": "gated-gelu", "position_encoding": positions}
    return fat5.FAT5EncoderModel(fat5.FAT5Config(**options)).eval()


@pytest.mark.parametrize(
    "positions",  # an export takes seconds, a trace of each is below
    ["t5", "fire", pytest.param("alibi", marks=pytest.mark.slow), pytest.param("rope", marks=pytest.mark.slow)],
)
def test_export(positions):
    ours, seen, new = encoder(positions), batch((9, 4)), batch((170, 20, 1))
    _bucket_lookup.cache_clear()  # the first thing a process does
    program = torch.export.export(ours, (), seen, dynamic_shapes=dict.fromkeys(seen, FREE))
    assert difference(program.module()(**new)[0], ours(**new)[0]) <= LOGITS_TOLERANCE


@POSITIONS
def test_trace(positions):
    ours, seen, new = encoder(positions), batch((9, 4)), batch((170, 20, 1))
    ours.config.return_dict = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, tuple(seen.values()))
    assert difference(traced(*new.values())[0], ours(**new)[0]) <= LOGITS_TOLERANCE


def test_export_of_the_whole_model():
    stock, given = t5_v1_1().eval(), rows()
    ours = fat5_like(stock).eval()
    how = {"decoder_input_ids": given.pop("labels").clamp(min=0), "use_cache": False}
    program = torch.export.export(ours, (), given | how)
    given["input_ids"] = given["input_ids"].flip(0) * given["attention_mask"]
    assert difference(program.module()(**given, **how).logits, stock(**given, **how).logits) <= LOGITS_TOLERANCE


class Logits(torch.nn.Module):
    """What a program that reads logits records."""

    def __init__(self, model: Any, use_cache: bool) -> None:
        super().__init__()
        self.model, self.how = model, {"use_cache": use_cache, "return_dict": True}

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
        return self.model(**dict(zip(names, tensors)), **self.how).logits


def traced(model: Any, given: tuple[torch.Tensor, ...]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.jit.trace(model, given, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(program, file)  # Python functions cannot be saved
    file.seek(0)
    assert "fat5::" not in str(program.inlined_graph)  # nor would another program know our operators
    return torch.jit.load(file)


def exported(model: Any, given: tuple[torch.Tensor, ...], strict: bool = False) -> Any:
    # strict asks for limits, and refuses a graph that keeps to narrower ones.
    source, target = (torch.export.Dim(name, min=2, max=512) for name in ("source", "target"))
    sides = ({1: source}, {1: source}, {1: target}, {1: target})
    program = torch.export.export(model, given, dynamic_shapes={"tensors": sides}, strict=strict)
    assert not [node for node in program.graph.nodes if "fat5" in str(node.target)]
    return program.module()


CASES = {
    "trace": ("fat5", traced, False),
    "trace-cached": ("fat5", traced, True),
    "export-cached": ("fat5", exported, True),
    "strict": ("fat5", partial(exported, strict=True), False),
    "accelerated-trace": ("accelerated", traced, True),
    "attn_implementation-trace": ("attn_implementation", traced, True),
    "attn_implementation-export": ("attn_implementation", exported, False),
}


# An export takes seconds; the other one keeps exports here, and a trace this kind.
SECONDS = {"strict", "attn_implementation-export"}


@pytest.mark.parametrize(
    ("kind", "recorder", "use_cache"),
    [pytest.param(*case, id=name, marks=pytest.mark.slow if name in SECONDS else ()) for name, case in CASES.items()],
)
def test_a_graph_heeds_both_masks(kind, recorder, use_cache):
    """Recorded with masks that hide nothing, and run with others, and with fewer tokens where a length is free."""
    stock = t5_v1_1().eval()
    ours = fat5_like(stock) if kind == "fat5" else copy.deepcopy(stock)
    if kind == "accelerated":
        fat5.accelerate(ours)
    elif kind == "attn_implementation":
        ours.set_attn_implementation("fat5")
    ids, start = torch.randint(2, 99, (3, 70)), torch.randint(2, 99, (3, 40))
    program = recorder(Logits(ours, use_cache), (ids, torch.ones_like(ids), start, torch.ones_like(start)))
    if recorder is not traced:
        ids, start = ids[:, :20], start[:, :9]
    mask, start_mask = torch.ones_like(ids), torch.ones_like(start)
    mask[1, 5:] = start_mask[0, :4] = 0
    kept = start_mask.bool()
    want = Logits(stock, use_cache)(ids, mask, start, start_mask)[kept]
    assert difference(program(ids, mask, start, start_mask)[kept], want) <= LOGITS_TOLERANCE


def test_a_graph_of_a_classifier():
    config = fat5.FAT5Config(**SIZES, head_form="encoder-decoder", num_labels=3, return_dict=False)
    ours = fat5.FAT5ForSequenceClassification(config).eval()
    ids = torch.randint(2, 99, (3, 20))
    ids[:, 12] = 1
    program = torch.export.export(ours, (ids, torch.ones_like(ids)), {"use_cache": False}).module()
    mask = torch.ones_like(ids)
    mask[:, 13:] = 0
    assert difference(program(ids, mask, use_cache=False)[0], ours(ids, mask, use_cache=False)[0]) <= LOGITS_TOLERANCE


@pytest.mark.slow
def test_the_onnx_exporter_takes_the_class_itself(tmp_path: Path):
    import onnxruntime

    ours, seen, new = encoder("t5"), batch((9, 4)), batch((170, 20, 1))
    file = str(tmp_path / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: "batch", 1: "length"},) * 2
        torch.onnx.export(
            ours, tuple(seen.values()), file, input_names=list(seen), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    session = onnxruntime.InferenceSession(file)
    got = torch.from_numpy(session.run(None, {name: x.numpy() for name, x in new.items()})[0])
    assert difference(got, ours(**new)[0]) <= LOGITS_TOLERANCE
