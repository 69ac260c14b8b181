"""Whether two models compute the same: random examples, the outputs of both, and their difference."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fat5.errors import CheckpointError
from fat5.model import FAT5Config

# Both sides compute in float32 and add in different orders: with 12+12 layers they differ by about 1e-6 of the largest
# output, with more layers by more. A misplaced tensor changes it by 1e-2 or more.
TOLERANCE = 1e-5
# Lengths of the documents in a batch: one beyond the 128 tokens where T5's buckets end, one of a single word.
LENGTHS = (160, 75, 23, 3)
DECODER_LENGTH = 16


@dataclass
class Comparison:
    """The largest difference between two models' outputs, relative to the largest output; `what` names the outputs."""

    what: str
    difference: float
    tolerance: float = TOLERANCE

    def require(self, where: object) -> "Comparison":
        """Returns itself; raises CheckpointError if the difference is above the tolerance, or not a number."""
        if not self.difference <= self.tolerance:
            raise CheckpointError(
                f"the converted model computes something else: {self.what} differ by {self.difference:.1e} of the "
                f"largest, tolerance {self.tolerance:.0e}; nothing was written",
                where=where,
                hint="Report this as an issue of FAT5, with the model's config.json",
            )
        return self


def random_examples(config: FAT5Config, seed: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask (4, 160), decoder_input_ids (4, 16), int64, distributed like text: a few tokens make
    most of it, and each example ends in EOS.
    """
    generator = torch.Generator().manual_seed(seed)
    longest = config.max_positions if config.position_encoding == "absolute" else LENGTHS[0]
    lengths = [min(length, longest) for length in LENGTHS]
    pad, eos = config.pad_token_id or 0, config.eos_token_id
    first = min(3, config.vocab_size - 1)

    def draw(*shape: int) -> Tensor:
        # The cube of a uniform number approximates Zipf's law.
        share = torch.rand(shape, generator=generator).pow(3)
        return first + (share * (config.vocab_size - first)).long().clamp(max=config.vocab_size - first - 1)

    input_ids, mask = draw(len(lengths), lengths[0]), torch.zeros(len(lengths), lengths[0], dtype=torch.long)
    input_ids[input_ids == eos] = first
    for row, length in enumerate(lengths):
        if isinstance(eos, int):
            input_ids[row, length - 1] = eos
        input_ids[row, length:] = pad
        mask[row, :length] = 1
    decoder_input_ids = draw(len(lengths), min(DECODER_LENGTH, longest))
    decoder_input_ids[:, 0] = pad if config.decoder_start_token_id is None else config.decoder_start_token_id
    return {"input_ids": input_ids, "attention_mask": mask, "decoder_input_ids": decoder_input_ids}


@torch.no_grad()
def outputs(model: Any, kind: str, examples: dict[str, Tensor]) -> Tensor:
    """The model's outputs for the examples, without padding, as one vector."""
    given: dict[str, Any] = {**examples, "use_cache": False}
    if kind not in ("ForConditionalGeneration", "Model"):
        given = {key: examples[key] for key in ("input_ids", "attention_mask")}
    result = model(**given, return_dict=True)
    keep = examples["attention_mask"].bool()
    names = ("logits", "last_hidden_state", "start_logits", "end_logits")
    found = [result[name].float() for name in names if name in result]
    return torch.cat([(x[keep] if x.shape[:2] == keep.shape else x).flatten() for x in found])


def compare(got: Tensor, want: Tensor, what: str, tolerance: float = TOLERANCE) -> Comparison:
    """The largest difference, relative to the largest entry of `want`."""
    if got.shape != want.shape:
        return Comparison(f"{what} (of shape {tuple(got.shape)} for {tuple(want.shape)})", float("nan"), tolerance)
    return Comparison(what, float((got - want).abs().max() / want.abs().max()), tolerance)
