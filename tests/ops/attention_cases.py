"""Attention problems for the kernel tests, the float64 answer, and what plain PyTorch makes of them."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fat5.ops.attention.bias import RelativeBias
from fat5.ops.attention.call import AttentionCall
from fat5.ops.attention.op import attend
from fat5.ops.attention.reference import attention_reference
from fat5.ops.triton.launch import Launch

# Small tiles, so that small problems hold far, near and ragged ones.
SMALL_TILES = {
    "forward": Launch(32, 16, 4, 1),
    "query_gradient": Launch(32, 16, 4, 1),
    "key_gradient": Launch(16, 32, 4, 1),
    "band": Launch(32, 32, 4, 1),  # wider than the dQ tile, as the tuned ones are
    "dense_gradient": Launch(16, 32, 4, 1),
}


@dataclass(frozen=True)
class Case:
    """One problem. Padded when `documents` is None, else packed: (query length, key length) of each document."""

    query_length: int = 0
    key_length: int = 0
    documents: tuple[tuple[int, int], ...] | None = None
    tail: int = 0
    """Rows after the last document, on both sides."""
    batch: int = 2
    heads: int = 2
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    bias: str = "none"
    """none, relative, or dense:BxHxQxK with 1 for a broadcast dimension and x for the full one."""
    reach: int = 7
    causal: bool = False
    scale: float = 1.0
    dropout_p: float = 0.0
    key_mask: bool = False
    strided: bool = False

    def __str__(self) -> str:
        where = f"Lq{self.query_length}-Lk{self.key_length}" if self.documents is None else f"N{len(self.documents)}"
        words = [where, f"D{self.head_dim}", self.bias, str(self.dtype).removeprefix("torch.")]
        words += [name for name in ("causal", "key_mask", "strided") if getattr(self, name)]
        words += [f"dropout{self.dropout_p}"] if self.dropout_p else []
        words += [f"scale{self.scale}"] if self.scale != 1.0 else []
        return "-".join(words)


@dataclass
class Inputs:
    """Tensors of a case; `bias` is the vector of a relative bias or the dense tensor."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    grad_out: Tensor
    options: dict = field(default_factory=dict)


def draw(case: Case, device: torch.device) -> Inputs:
    """Fresh random inputs."""
    packed = case.documents is not None
    if packed:
        rows_q, rows_k = (sum(d[side] for d in case.documents) + case.tail for side in (0, 1))
        shape_q, shape_k = ((rows, case.heads, case.head_dim) for rows in (rows_q, rows_k))
        max_q, max_k = (max((d[side] for d in case.documents), default=0) for side in (0, 1))
    else:
        shape_q, shape_k = (
            (case.batch, case.heads, rows, case.head_dim) for rows in (case.query_length, case.key_length)
        )
        max_q, max_k = case.query_length, case.key_length

    def randn(shape: tuple[int, ...]) -> Tensor:
        if not case.strided:
            return torch.randn(shape, device=device).to(case.dtype)
        # Heads and rows swapped in memory, inside a wider tensor, every second element of the last dimension.
        wide = torch.randn(shape[0], shape[2] + 1, shape[1] + 3, 2 * shape[-1], device=device) if not packed else None
        if wide is None:
            return (
                torch.randn(shape[1], shape[0] + 3, shape[2], device=device)
                .to(case.dtype)
                .transpose(0, 1)[1 : 1 + shape[0]]
            )
        return wide.to(case.dtype)[:, : shape[2], : shape[1], ::2].transpose(1, 2)

    q, k, v, grad_out = randn(shape_q) * 0.8, randn(shape_k) * 0.8, randn(shape_k), randn(shape_q)
    bias = None
    if case.bias == "relative":
        bias = torch.randn(case.heads, 2 * case.reach + 1, device=device)
    elif case.bias.startswith("dense:"):
        full = (len(case.documents) if packed else case.batch, case.heads, max_q, max_k)
        sizes = case.bias.removeprefix("dense:").split("x")
        bias = torch.randn([want if size == "n" else 1 for size, want in zip(sizes, full)], device=device).to(
            case.dtype
        )
    options: dict = {"causal": case.causal, "scale": case.scale, "dropout_p": case.dropout_p}
    options["seed"] = torch.randint(0, 2**62, (1,), device=device) if case.dropout_p else None
    options["key_padding_mask"] = None
    if case.key_mask:
        mask = torch.rand(case.batch, case.key_length, device=device) > 0.3
        mask[-1] = False
        options["key_padding_mask"] = mask
    for side, name in ((0, "q"), (1, "k")):
        starts = None
        if packed:
            lengths = torch.tensor([0, *(d[side] for d in case.documents)])
            starts = lengths.cumsum(0).to(device, torch.int32)
        options[f"cu_seqlens_{name}"] = starts
    return Inputs(q, k, v, bias, grad_out, options)


def gradients(
    attend, inputs: Inputs, dtype: torch.dtype | None = None, bias_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """out and the gradients of q, k, v and bias by `attend(q, k, v, bias, **options)`, in the dtype named."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    if dtype is None:
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    bias = leaf = None
    if inputs.bias is not None:
        leaf = inputs.bias.detach().to(bias_dtype or dtype or inputs.bias.dtype).requires_grad_()
        bias = RelativeBias(leaf) if leaf.dim() == 2 else leaf
    out = attend(*leaves, bias, **inputs.options)
    out.backward(inputs.grad_out.to(out.dtype))
    found = {"out": out.detach(), "dq": leaves[0].grad, "dk": leaves[1].grad, "dv": leaves[2].grad}
    return found if leaf is None else found | {"dbias": leaf.grad}


def exact(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | Tensor | None, **options) -> Tensor:
    """The specification; float64 when its inputs are."""
    return attention_reference(call_of(q, k, v, bias, **options))


def by_triton(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | Tensor | None, **options) -> Tensor:
    """The kernels."""
    return attend(call_of(q, k, v, bias, **options), "triton")


def by_hopper(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | Tensor | None, **options) -> Tensor:
    """What we hook into flash-attn-4."""
    return attend(call_of(q, k, v, bias, **options), "hopper")


def by_both(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | Tensor | None, **options) -> Tensor:
    """Triton's forward, flash-attn-4's backward with our hooks."""
    return attend(call_of(q, k, v, bias, **options), "mixed")


def call_of(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | Tensor | None, **options) -> AttentionCall:
    """The call that `fat5.ops.attention` would make, with a seed of our own."""
    vector = bias.vector if isinstance(bias, RelativeBias) else None
    return AttentionCall(q, k, v, vector, bias if isinstance(bias, Tensor) else None, **options)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias | Tensor | None, **options) -> Tensor:
    """The same in plain PyTorch, every step in the precision of the inputs: what users would otherwise write."""
    from fat5.ops.attention.dropout import keep_mask

    def one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, document: int, visible: Tensor | None) -> Tensor:
        scores = options["scale"] * (q @ k.transpose(-1, -2))
        if bias is not None:
            scores = scores + bias.to(q.dtype)
        hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=q.device)
        hidden = hidden | torch.ones_like(hidden).triu(1) if options["causal"] else hidden
        hidden = hidden if visible is None else hidden | ~visible
        blind = hidden.all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(hidden & ~blind, float("-inf")), -1).masked_fill(hidden, 0.0)
        if options["dropout_p"]:
            keep = keep_mask(
                options["seed"], options["dropout_p"], document, q.shape[0], range(q.shape[1]), range(k.shape[1])
            )
            weights = weights * keep / (1.0 - options["dropout_p"])
        return weights @ v

    starts_q, starts_k, mask = (options[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "key_padding_mask"))
    if starts_q is None:
        dense = bias.dense(q.shape[2], k.shape[2]) if isinstance(bias, RelativeBias) else bias
        rows = []
        for b in range(q.shape[0]):
            own = None if dense is None else dense[b if dense.shape[0] > 1 else 0]
            rows.append(one(q[b], k[b], v[b], own, b, None if mask is None else mask[b]))
        return torch.stack(rows)
    pieces = []
    for n, (q0, q1, k0, k1) in enumerate(zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:])):
        own = None
        if isinstance(bias, RelativeBias):
            own = bias.dense(int(q1 - q0), int(k1 - k0))[0]
        elif bias is not None:
            own = bias[n if bias.shape[0] > 1 else 0][:, : q1 - q0, : k1 - k0]
        document = (x[a:b].transpose(0, 1) for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1)))
        pieces.append(one(*document, own, n, None).transpose(0, 1))
    return torch.cat([*pieces, torch.zeros_like(q[int(starts_q[-1]) :])])


def distance(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference; NaN stays NaN, which no bound admits."""
    return (found.double() - expected.double()).norm().item()


def error(found: Tensor, expected: Tensor) -> float:
    """The distance over the norm of the expectation."""
    return distance(found, expected) / expected.double().norm().clamp(min=1e-12).item()


def alone(inputs: Inputs, case: Case, n: int) -> tuple[Inputs, Case]:
    """Document n of a packed case as a padded problem of one batch row."""
    starts_q, starts_k = inputs.options["cu_seqlens_q"].tolist(), inputs.options["cu_seqlens_k"].tolist()
    rows_q, rows_k = slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])
    pick = {"q": rows_q, "k": rows_k, "v": rows_k, "grad_out": rows_q}
    tensors = {name: getattr(inputs, name)[rows].transpose(0, 1)[None] for name, rows in pick.items()}
    options = inputs.options | {"cu_seqlens_q": None, "cu_seqlens_k": None}
    return Inputs(bias=inputs.bias, options=options, **tensors), replace(case, documents=None)
