"""Cross-entropy of a chunk of logits in Triton: each token's loss, and the logits turned in place into its gradient.

The matrix products around it are cuBLAS's (linear_cross_entropy.py): they are the bulk of the work and no kernel of
ours would beat them; what is left is one read of the logits for the softmax, one more for the gradient (from the L2
cache, a row is small), and one write.
"""

import triton
import triton.language as tl
from torch import Tensor

from fat5.ops.triton.launch import Launch, run
from fat5.ops.triton.numerics import round_to

BLOCK, WARPS = 4096, 8


# `vocabulary` is specialised on: knowing it as a multiple of 16 keeps masked loads 16 bytes wide.
@triton.jit(do_not_specialize=["ignore_index", "z_loss", "smoothing"])
def cross_entropy_kernel(
    Logits, Labels, Loss, RowScale, row_stride, vocabulary, ignore_index, z_loss, smoothing,
    BLOCK: tl.constexpr, GRADIENT: tl.constexpr, SCALED: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """A program owns a row: Loss = lse - (1 - e) x[label] - e mean(x) + z lse^2, and with GRADIENT

    Logits = scale (softmax (1 + 2 z lse) - e / V - (1 - e) [column = label]). An ignored row gets zeros; a label
    outside the vocabulary gets NaN, which the caller's guards see, and never a wild address.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    start = Logits + row * row_stride
    label = tl.load(Labels + row)
    columns = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(Loss + row, 0.0)
        if GRADIENT:
            for first in range(0, vocabulary, BLOCK):
                zeros = tl.zeros((BLOCK,), Logits.dtype.element_ty)
                tl.store(start + first + columns, zeros, mask=first + columns < vocabulary)
    else:
        # Each lane keeps its own maximum and sum, so that a step of the loop needs no reduction.
        highest = tl.full((BLOCK,), float("-inf"), tl.float32)
        exponentials = tl.zeros((BLOCK,), tl.float32)
        plain = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, vocabulary, BLOCK):
            inside = first + columns < vocabulary
            x = tl.load(start + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, x)
            # -inf less -inf is NaN: a lane that has seen nothing keeps a sum of 0.
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            exponentials = exponentials * tl.exp(highest - anchor) + tl.exp(x - anchor)
            highest = higher
            if SMOOTH:
                plain += tl.where(inside, x, 0.0)
        top = tl.max(highest, 0)
        anchor = tl.where(top == float("-inf"), 0.0, top)
        lse = anchor + tl.log(tl.sum(exponentials * tl.exp(highest - anchor), 0))
        known = (label >= 0) & (label < vocabulary)
        at_label = tl.load(start + label, mask=known, other=float("nan")).to(tl.float32)
        loss = lse - (1.0 - smoothing) * at_label + z_loss * lse * lse
        if SMOOTH:
            loss -= smoothing * (tl.sum(plain, 0) / vocabulary)
        tl.store(Loss + row, loss)
        if GRADIENT:
            scale = 1.0
            if SCALED:
                scale = tl.load(RowScale + row).to(tl.float32)
            scale = tl.where(known, scale, float("nan"))
            share = scale * (1.0 + 2.0 * z_loss * lse)
            everywhere = scale * smoothing / vocabulary
            there = scale * (1.0 - smoothing)
            # Every lane must have read the label's logit before another overwrites it.
            tl.debug_barrier()
            for first in range(0, vocabulary, BLOCK):
                column = first + columns
                x = tl.load(start + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
                grad = share * tl.exp(x - lse) - everywhere - tl.where(column == label, there, 0.0)
                tl.store(start + column, round_to(grad, Logits.dtype.element_ty), mask=column < vocabulary)


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor,
    row_scale: Tensor | None,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    gradient: bool,
) -> None:
    """Writes each row's loss, and with `gradient` overwrites `logits` with d(sum of row_scale * loss) / d logits.

    logits (T, V) with unit stride along V; labels (T,) int64; loss (T,) float32, contiguous; row_scale (T,) or None
    for ones.
    """
    labels = labels.contiguous()
    scale = loss if row_scale is None else row_scale.contiguous()
    block = min(BLOCK, max(16, triton.next_power_of_2(logits.shape[1])))
    run(
        cross_entropy_kernel,
        logits.shape[0],
        {
            "Logits": logits, "Labels": labels, "Loss": loss, "RowScale": scale, "row_stride": logits.stride(0),
            "vocabulary": logits.shape[1], "ignore_index": ignore_index, "z_loss": z_loss,
            "smoothing": label_smoothing,
        },
        {"BLOCK": block, "GRADIENT": gradient, "SCALED": row_scale is not None, "SMOOTH": label_smoothing > 0.0},
        Launch(1, block, WARPS, 1),
    )  # fmt: skip
