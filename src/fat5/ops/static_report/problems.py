"""Attention problems that together use every shipped kernel, and the launches that each of them records."""

from typing import NamedTuple

import torch

from fat5.ops.attention.triton_attention import attention_backward, attention_forward, prepare
from fat5.ops.attention.triton_launch import Launch, Recorded, overridden, recording


class Problem(NamedTuple):
    """The compile-time side of an attention call; its sizes are small and its strides those of real use."""

    head_dim: int
    dtype: torch.dtype
    bias: str
    """relative, dense or none."""
    causal: bool = False
    packed: bool = True
    key_mask: bool = False
    dropout_p: float = 0.0

    def label(self) -> str:
        words = [self.bias, "causal" if self.causal else "", "packed" if self.packed else "padded"]
        words += ["key-mask" if self.key_mask else "", "dropout" if self.dropout_p else ""]
        return " ".join(word for word in words if word)


# R of T5's bidirectional buckets with max_distance 128 (docs/attention.md).
REACH = 91


def launches(problem: Problem, **launch: Launch) -> list[Recorded]:
    """The attention kernels of one forward and backward, recorded over small CPU tensors; `launch` overrides the
    table."""
    heads, length = 16, 256
    if problem.packed:
        q, k, v = (torch.zeros(2 * length, heads, problem.head_dim, dtype=problem.dtype) for _ in range(3))
        starts = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    else:
        q, k, v = (
            torch.zeros(2, length, heads, problem.head_dim, dtype=problem.dtype).transpose(1, 2) for _ in range(3)
        )
        starts = None
    vector = torch.zeros(heads, 2 * REACH + 1) if problem.bias == "relative" else None
    dense = torch.zeros(1, heads, length, length, dtype=problem.dtype) if problem.bias == "dense" else None
    mask = torch.ones(2, length, dtype=torch.bool) if problem.key_mask else None
    seed = torch.zeros(1, dtype=torch.int64) if problem.dropout_p else None
    inputs = (q, k, v, vector, dense, mask, seed, starts, starts)
    options = (problem.causal, 1.0, problem.dropout_p)
    with recording() as recorded, overridden(**launch):
        padded, forward, *lists = prepare(q, k, vector, starts, starts, problem.causal, 1.0, True)
        out, lse = attention_forward(*inputs, padded, forward, *lists, *options)
        grad_out = torch.zeros_like(out)
        attention_backward(grad_out, *inputs, padded, *lists, out, lse, *options, problem.bias != "none")
    return [one for one in recorded if one.launch is not None]
