"""Graphs of our classes, recorded by torch.export, torch.jit and the ONNX exporter, hold for batches not yet seen."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from stock import LOGITS_TOLERANCE, SIZES, difference, fat5_like, rows, t5_v1_1

import fat5
from fat5.ops.attention.bias import _bucket_lookup

POSITIONS = pytest.mark.parametrize("positions", ["t5", "alibi", "rope", "fire"])
FREE = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


def batch(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(2, 99, mask.shape) * mask, "attention_mask": mask}


def encoder(positions: str) -> Any:
    options: dict[str, Any] = SIZES | {"feed_forward_proj": "gated-gelu", "position_encoding": positions}
    return fat5.FAT5EncoderModel(fat5.FAT5Config(**options)).eval()


@POSITIONS
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
