"""Attention problems for tests, and the rule that a fast path is judged by."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fat5.ops import RelativeBias, attention

# A fast path's error against float64 may be so many times that of plain PyTorch in the same precision (attention.md).
OUTPUT_RATIO, GRADIENT_RATIO = 2.0, 3.0
# Below this share of the largest value (of 1, the size of the inputs, where that is more) both errors are a few
# roundings, and
# their ratio says nothing.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@dataclass
class Problem:
    """Inputs of one attention call; `vector` or `dense` is the bias."""

    q: Tensor
    k: Tensor
    v: Tensor
    vector: Tensor | None = None
    dense: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str, dtype: torch.dtype) -> list[Tensor]:
        """out, dq, dk, dv and, if there is one, the bias's gradient."""
        inputs = [x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        leaves, bias = list(inputs), None
        given = self.vector if self.vector is not None else self.dense
        if given is not None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            leaves.append(given.detach().to(wide).requires_grad_())
            bias = RelativeBias(leaves[-1]) if self.vector is not None else leaves[-1]
        out = attention(*inputs, bias=bias, backend=backend, **self.options)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def plain(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Plain PyTorch in `dtype`: the reference's formula, every step rounded to it."""
    return problem.run("reference", dtype)


def assert_as_good_as_plain(problem: Problem, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Every output and gradient of `backend` is as close to float64 as the rule demands."""
    exact, plainly = problem.run("reference", torch.float64), plain(problem, dtype)
    for name, want, mild, got in zip(("out", "dq", "dk", "dv", "dbias"), exact, plainly, problem.run(backend, dtype)):
        ratio = OUTPUT_RATIO if name == "out" else GRADIENT_RATIO
        allowed = ratio * largest(mild.double() - want) + FLOOR[dtype] * (1.0 + largest(want))
        error = largest(got.double() - want)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def largest(x: Tensor) -> float:
    """The largest magnitude, 0 of nothing; NaN if any is."""
    return x.abs().max().item() if x.numel() else 0.0


def make(
    length_q: int,
    length_k: int,
    *,
    bias: str = "vector",
    layout: str = "batched",
    head_dim: int = 16,
    reach: int = 40,
    heads: int = 3,
    **options: Any,
) -> Problem:
    """A random problem. layout: batched, strided, masked, holes, packed."""
    batch = 2
    options = {"scale": 0.5} | options
    if layout == "strided":
        q, k, v = (
            torch.randn(batch, length, heads, 2 * head_dim)[..., ::2].transpose(1, 2)
            for length in (length_q, length_k, length_k)
        )
    else:
        q, k, v = (torch.randn(batch, heads, length, head_dim) for length in (length_q, length_k, length_k))
    if layout == "masked":
        mask = torch.ones(batch, length_k, dtype=torch.bool)
        mask[0, : length_k // 4] = mask[1, length_k - length_k // 3 :] = False
        options["key_padding_mask"] = mask
    elif layout == "holes":
        options["key_padding_mask"] = torch.rand(batch, length_k) < 0.5
    elif layout == "packed":
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        options |= packed_options(length_q, length_k)
    vector = torch.randn(heads, 2 * reach + 1) if bias == "vector" else None
    dense = torch.randn(1, heads, length_q, length_k) if bias == "dense" else None
    return Problem(q, k, v, vector, dense, options)


def packed_options(length_q: int, length_k: int) -> dict[str, Any]:
    """Documents in 2 * length rows: an empty one, three of different lengths, two repeats of the end, and a free
    tail.
    """

    def starts(length: int, tail: int) -> Tensor:
        end = max(2 * length - tail, length)
        return torch.tensor([0, 0, length // 3, length, end, end, end], dtype=torch.int32)

    return {
        "cu_seqlens_q": starts(length_q, 2), "cu_seqlens_k": starts(length_k, 1),
        "max_seqlen_q": length_q, "max_seqlen_k": length_k,
    }  # fmt: skip
