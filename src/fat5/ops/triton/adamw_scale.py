"""The AdamWScale step of many tensors in three launches; the specification is `_plain_step` of optim/adamw_scale.py.

A table on the device holds the addresses of every tensor, and tensors are cut into chunks of CHUNK elements, a program
each: sums of squares of the weights, the rate of each tensor from its chunks' sums in a fixed order, then the step.
Weights are read twice, everything else once, and every result written once.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fat5.ops.triton.launch import Launch, run
from fat5.ops.triton.numerics import round_to

CHUNK, LAUNCH = 1 << 14, Launch(1, 2048, 8, 1)
# Partial sums that a program reads at a time.
SUMS = 1024


@triton.jit
def square_sum_kernel(Addresses, Sizes, Firsts, Owners, Partial, W: tl.constexpr, CHUNK: tl.constexpr,
                      BLOCK: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """Partial[chunk] = sum of squares of its weights."""
    chunk = tl.program_id(0)
    tensor = tl.load(Owners + chunk)
    start = tl.cast(chunk - tl.load(Firsts + tensor), tl.int64) * CHUNK
    size = tl.load(Sizes + tensor)
    weight = _address(Addresses, tensor, W, ALIGNED) + start
    index = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if start + CHUNK <= size:
        for step in range(0, CHUNK, BLOCK):
            x = tl.load(weight + step + index).to(tl.float32)
            total += x * x
    else:
        for step in range(0, CHUNK, BLOCK):
            x = tl.load(weight + step + index, mask=start + step + index < size, other=0.0).to(tl.float32)
            total += x * x
    tl.store(Partial + chunk, tl.sum(total, 0))


@triton.jit(do_not_specialize=["min_scale"])
def rate_kernel(Partial, Firsts, Sizes, Factors, Rates, min_scale, SUMS: tl.constexpr):
    """Rates[tensor] = max(min_scale, RMS of the weight) * Factors[tensor]."""
    tensor = tl.program_id(0)
    index = tl.arange(0, SUMS)
    stop = tl.load(Firsts + tensor + 1)
    total = tl.zeros((SUMS,), tl.float32)
    for first in range(tl.load(Firsts + tensor), stop, SUMS):
        total += tl.load(Partial + first + index, mask=first + index < stop, other=0.0)
    mean = tl.sum(total, 0) / tl.load(Sizes + tensor).to(tl.float32)
    tl.store(Rates + tensor, tl.maximum(tl.sqrt_rn(mean), min_scale) * tl.load(Factors + tensor))


@triton.jit(do_not_specialize=["tensors", "eps", "decay", "beta1_rest", "beta2", "beta2_rest"])
def adamw_scale_kernel(
    Addresses, Sizes, Firsts, Owners, Rates, Roots, FoundInf, tensors, eps, decay, beta1_rest, beta2, beta2_rest,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, KAHAN: tl.constexpr, SKIPS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One step of a chunk, everything in float32 between its load and its store."""
    chunk = tl.program_id(0)
    tensor = tl.load(Owners + chunk)
    start = tl.cast(chunk - tl.load(Firsts + tensor), tl.int64) * CHUNK
    size = tl.load(Sizes + tensor)
    rate = tl.load(Rates + tensor)
    root = tl.load(Roots + tensor)
    weight = _address(Addresses, tensor, W, ALIGNED) + start
    grad = _address(Addresses, tensors + tensor, G, ALIGNED) + start
    first = _address(Addresses, 2 * tensors + tensor, M, ALIGNED) + start
    second = _address(Addresses, 3 * tensors + tensor, tl.float32, ALIGNED) + start
    lost = weight
    if KAHAN:
        lost = _address(Addresses, 4 * tensors + tensor, W, ALIGNED) + start
    numbers = (rate, root, eps, decay, beta1_rest, beta2, beta2_rest)
    live = True
    if SKIPS:
        live = tl.load(FoundInf) == 0
    if live:
        if start + CHUNK <= size:
            for step in range(0, CHUNK, BLOCK):
                _update(weight, grad, first, second, lost, step, CHUNK, numbers, KAHAN, BLOCK, False)
        else:
            for step in range(0, CHUNK, BLOCK):
                _update(weight, grad, first, second, lost, step, size - start, numbers, KAHAN, BLOCK, True)


@triton.jit
def _update(
    weight, grad, first, second, lost, step, size, numbers,
    KAHAN: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    rate, root, eps, decay, beta1_rest, beta2, beta2_rest = numbers
    index = step + tl.arange(0, BLOCK)
    # A chunk that is full needs no mask, and a load without one is as wide as the alignment allows.
    mask = None
    if MASKED:
        mask = index < size
    w = tl.load(weight + index, mask=mask).to(tl.float32)
    g = tl.load(grad + index, mask=mask).to(tl.float32)
    m = tl.load(first + index, mask=mask).to(tl.float32)
    v = tl.load(second + index, mask=mask)
    m += beta1_rest * (g - m)
    v = beta2 * v + beta2_rest * g * g
    update = m / (tl.sqrt_rn(v) * root + eps) * rate - decay * w
    if KAHAN:
        update += tl.load(lost + index, mask=mask).to(tl.float32)
    new = round_to(w + update, weight.dtype.element_ty)
    tl.store(weight + index, new, mask=mask)
    tl.store(first + index, round_to(m, first.dtype.element_ty), mask=mask)
    tl.store(second + index, v, mask=mask)
    if KAHAN:
        tl.store(lost + index, round_to(update - (new.to(tl.float32) - w), lost.dtype.element_ty), mask=mask)


@triton.jit
def _address(Addresses, slot, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(Addresses + slot).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# No operator of torch.library: handing it a thousand tensors took four times as long as the step itself.
@torch.compiler.disable
def adamw_scale_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    compensations: list[Tensor],
    steps: list[Tensor],
    found_inf: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    min_scale: float,
    eps_before_correction: bool = False,
    rms: Tensor | None = None,
) -> None:
    """One step of all weights, in place.

    Args:
        weights, grads, exp_avgs, exp_avg_sqs, compensations: contiguous, of one device; of each list one dtype.
            compensations is empty without Kahan summation; the second moments are float32.
        steps: float32 scalars on that device, counted up.
        found_inf: a float32 scalar on that device; where it is not 0, everything stays as it is.
        rms: float32, the root mean square of each weight, or of the matrix that it is a part of; computed here if None.
    """
    if not weights:
        return
    device = weights[0].device
    torch._foreach_add_(steps, 1)
    # Powers in float64: 1 - 0.999 keeps few digits in float32.
    counts = torch.stack(steps).double()
    factors, roots = -lr / (1 - beta1**counts), (1 - beta2**counts).rsqrt()
    if eps_before_correction:
        factors, roots = factors / roots, torch.ones_like(roots)
    factors, roots = factors.float(), roots.float()
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf.clamp(max=1)] * len(steps))
    lists = [weights, grads, exp_avgs, exp_avg_sqs, *([compensations] if compensations else [])]
    pointers = tuple(x.data_ptr() for tensors in lists for x in tensors)
    addresses = _on_device(pointers, torch.int64, device)
    sizes, firsts, owners, chunks = _cut(tuple(x.numel() for x in weights), CHUNK, device)
    partial, rates = (torch.empty(n, dtype=torch.float32, device=device) for n in (chunks, len(weights)))
    common = {"CHUNK": CHUNK, "BLOCK": LAUNCH.block_n, "ALIGNED": all(p % 16 == 0 for p in pointers)}
    types = [_TYPES[x.dtype] for x in (weights[0], grads[0], exp_avgs[0])]
    table = {"Addresses": addresses, "Sizes": sizes, "Firsts": firsts, "Owners": owners}
    if rms is not None:
        rates = rms.clamp_min(min_scale) * factors
    else:
        run(square_sum_kernel, chunks, table | {"Partial": partial}, {"W": types[0]} | common, LAUNCH)
        run(
            rate_kernel,
            len(weights),
            {
                "Partial": partial, "Firsts": firsts, "Sizes": sizes, "Factors": factors, "Rates": rates,
                "min_scale": min_scale,
            },
            {"SUMS": SUMS},
            Launch(1, SUMS, 4, 1),
        )  # fmt: skip
    run(
        adamw_scale_kernel,
        chunks,
        {
            **table, "Rates": rates, "Roots": roots, "FoundInf": rates if found_inf is None else found_inf,
            "tensors": len(weights), "eps": eps, "decay": lr * weight_decay,
            "beta1_rest": 1 - beta1, "beta2": beta2, "beta2_rest": 1 - beta2,
        },
        {**dict(zip("WGM", types)), "KAHAN": bool(compensations), "SKIPS": found_inf is not None, **common},
        LAUNCH,
    )  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@lru_cache(maxsize=256)
def _cut(sizes: tuple[int, ...], chunk: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
    """Sizes (int64), first chunk of each tensor and one past the last (int32), owner of each chunk (int32)."""
    counts = torch.tensor([triton.cdiv(size, chunk) for size in sizes])
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    owners = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    return (
        torch.tensor(sizes, device=device),
        firsts.to(device, torch.int32),
        owners.to(device, torch.int32),
        int(firsts[-1]),
    )


@lru_cache(maxsize=256)
def _on_device(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Gradients keep their addresses from step to step more often than not; otherwise a copy that nobody waits for."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
