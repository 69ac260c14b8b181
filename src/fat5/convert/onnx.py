"""An encoder as ONNX, for any batch size, length and position encoding; verified in onnxruntime."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fat5.convert.verification import Comparison, compare

FILE = "model.onnx"
# A protobuf cannot hold more bytes; larger weights go into a file beside it.
LARGEST_PROTOBUF = 1 << 31


class EncoderRows(nn.Module):
    """The encoder, returning only its hidden states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) int64 ids and mask to (B, L, d_model)."""
        return self.encoder(input_ids, attention_mask=attention_mask)[0]  # type: ignore[no-any-return]


def write_onnx(model: Any, folder: Path) -> None:
    """Writes a FAT5EncoderModel as model.onnx (input_ids and attention_mask to last_hidden_state) and config.json."""
    ids = torch.tensor([[5, 6, 7, 8, 1], [5, 6, 1, 0, 0]]).clamp(max=model.config.vocab_size - 1)
    free = {0: "batch", 1: "length"}
    rows, mask = EncoderRows(model.encoder).eval(), (ids > 0).long()
    with torch.no_grad(), _silent():
        program = torch.onnx.export(
            rows,
            (ids, mask),
            dynamo=True,
            verbose=False,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_shapes={"input_ids": free, "attention_mask": free},
        )
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
        program.save(str(folder / FILE), external_data=size >= LARGEST_PROTOBUF)  # type: ignore[union-attr]
    model.config.save_pretrained(folder)


def verify_onnx(folder: Path, model: Any, examples: dict[str, Tensor]) -> Comparison:
    """The largest difference at any token, for batch sizes and lengths that the export has not seen."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    worst = 0.0
    ids, mask = examples["input_ids"], examples["attention_mask"]
    # The whole batch; its longest example alone; a batch of one token each; the shortest two.
    for rows, length in ((slice(None), ids.shape[1]), (slice(0, 1), ids.shape[1]), (slice(None), 1), (slice(2, 4), 23)):
        batch = {"input_ids": ids[rows, :length], "attention_mask": mask[rows, :length]}
        keep = batch["attention_mask"].bool()
        with torch.no_grad():
            want = model(**batch).last_hidden_state[keep]
        got = torch.from_numpy(session.run(None, {key: value.numpy() for key, value in batch.items()})[0])[keep]
        difference = compare(got, want, "").difference
        worst = difference if not difference <= worst else worst
    return Comparison(
        "hidden states of four batches of other shapes (onnxruntime on the copy, FAT5 on the source)", worst
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Inside, the exporter prints no warnings."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(before)
