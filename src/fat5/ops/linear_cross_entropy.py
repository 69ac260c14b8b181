"""The output projection and its cross-entropy in one operation, in chunks of rows: the logits never exist whole.

The forward pass also computes the gradients from each chunk's probabilities, so that a chunk is projected once. Only
reduction="none" projects again in backward, because each row then has its own upstream gradient. The matrix products
are the library's; between them runs plain PyTorch, or one Triton kernel that replaces a chunk of logits by its gradient
(choice.py).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fat5.ops.choice import uses_triton
from fat5.ops.linear import product, serves

# Entries of one chunk of logits. On the CPU 16 MB of float32, about the last-level cache.
CHUNK_ENTRIES_CPU, CHUNK_ENTRIES_ACCELERATOR = 1 << 22, 1 << 27
# Each chunk reads and writes the whole gradient of the weight, so it must have rows enough to be worth that.
FEWEST_ROWS_CPU, FEWEST_ROWS_ACCELERATOR = 256, 64
# What every operator below takes.
_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor labels, float z_loss, float label_smoothing, int ignore_index, SymInt chunk, "
    "ScalarType dtype"
)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(hidden @ weight.T, labels) + z_loss * logsumexp^2, with the logits made whole."""
    compute = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ weight.to(hidden.dtype).t()).to(compute)
    loss = F.cross_entropy(logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    valid = labels != ignore_index
    loss = loss + z_loss * torch.logsumexp(logits, dim=-1).square() * valid
    if reduction == "none":
        return loss
    return _mean(loss.sum(), labels, ignore_index) if reduction == "mean" else loss.sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against `labels`, in memory that does not hold the logits.

    Args:
        hidden: (T, d) floating point, or (..., d); under autocast the product is made in autocast's dtype.
        weight: (V, d).
        labels: (T,) or (...) int64, each in [0, V) or `ignore_index`.
        z_loss: weight of logsumexp(logits)^2, added to each token's loss (PaLM, section 5), at least 0.
        label_smoothing: share of the target spread over the vocabulary, in [0, 1).
        reduction: "mean" over the labels that count (NaN when none does, with gradients of 0, as in PyTorch), "sum",
            or "none".
        chunk_size: rows of logits at a time; by default `default_chunk_size(weight)`.

    Returns:
        A scalar, or labels' shape for "none" with 0 where ignored; float32 (float64 for float64 inputs). Probabilities
        and sums are in float32, the gradient of `weight` is accumulated in float32.

    Raises:
        TypeError, ValueError: naming the argument and what was expected.
    """
    _check(hidden, weight, labels)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss: expected a number of at least 0, got {z_loss}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    shape, hidden, labels = labels.shape, hidden.flatten(0, -2), labels.flatten()
    chunk = chunk_size or default_chunk_size(weight)
    settings = (float(z_loss), float(label_smoothing), ignore_index, chunk, _compute_dtype(hidden))
    if reduction == "none":
        return _per_token(hidden, weight, labels, *settings).view(shape)
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, _, _ = _summed(hidden, weight, labels, *settings, with_gradients)
    return _mean(total, labels, ignore_index) if reduction == "mean" else total


def _check(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "weight: expected (vocabulary, d) beside hidden (tokens, d), "
            f"got {tuple(weight.shape)} and {tuple(hidden.shape)}"
        )
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected an int64 tensor, got {got}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}")
    for name, x in (("weight", weight), ("labels", labels)):
        if x.device != hidden.device:
            raise ValueError(f"{name}: expected the device of hidden, {hidden.device}, got {x.device}")


def _mean(total: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Over the labels that count; where none does NaN, without making the gradients NaN."""
    count = (labels != ignore_index).sum()
    return torch.where(count > 0, total / count.clamp(min=1), float("nan"))


@torch.no_grad()
def token_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Each token's negative log-likelihood (T,) float32, 0 where ignored, and whether its label has the highest
    logit (T,) bool.
    """
    losses, correct = [], []
    for rows in _chunks(len(labels), chunk_size or default_chunk_size(weight)):
        logits = _logits(hidden[rows], weight, _compute_dtype(hidden))
        losses.append(F.cross_entropy(logits, labels[rows], ignore_index=ignore_index, reduction="none"))
        correct.append(logits.argmax(dim=-1) == labels[rows])
    if not losses:
        return hidden.new_zeros(0, dtype=torch.float32), labels.new_zeros(0, dtype=torch.bool)
    return torch.cat(losses), torch.cat(correct)


def default_chunk_size(weight: Tensor) -> int:
    """Rows of logits at a time: a multiple of 64."""
    if weight.device.type == "cpu":
        entries, fewest = CHUNK_ENTRIES_CPU, FEWEST_ROWS_CPU
    else:
        entries, fewest = CHUNK_ENTRIES_ACCELERATOR, FEWEST_ROWS_ACCELERATOR
    return max(fewest, entries // weight.shape[0] // 64 * 64)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    logits = product(hidden.to(dtype), weight.to(dtype).t())
    return logits.to(torch.promote_types(dtype, torch.float32))


def _chunk_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_scale: Tensor | None,
    gradient: bool,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor | None]:
    """Each row's loss, and d(sum of row_scale * loss) / d logits in weight's dtype (None without `gradient`); a
    row_scale of None is ones."""
    if uses_triton("linear_cross_entropy", weight):
        from fat5.ops.triton.cross_entropy import cross_entropy_

        logits = hidden.to(weight.dtype) @ weight.t()
        loss = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
        cross_entropy_(logits, labels, loss, row_scale, z_loss, label_smoothing, ignore_index, gradient)
        return loss, logits if gradient else None
    logits = _logits(hidden, weight, weight.dtype)
    valid = (labels != ignore_index).to(logits.dtype)
    target = torch.where(labels == ignore_index, 0, labels)[:, None]
    log_probabilities = torch.log_softmax(logits, dim=-1)
    loss = -log_probabilities.gather(1, target)[:, 0]
    log_sum = logits.gather(1, target)[:, 0] + loss
    del logits
    if label_smoothing > 0.0:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * log_probabilities.mean(dim=-1)
    if z_loss > 0.0:
        loss = loss + z_loss * log_sum.square()
    loss = loss * valid
    if not gradient:
        return loss, None
    scale = (valid if row_scale is None else row_scale.to(valid.dtype) * valid)[:, None]
    grad = log_probabilities.exp_()
    if z_loss > 0.0:
        grad.mul_(scale * (1.0 + 2.0 * z_loss * log_sum[:, None]))
    else:
        grad.mul_(scale)
    if label_smoothing > 0.0:
        grad.sub_(scale * (label_smoothing / grad.shape[1]))
    return loss, grad.scatter_add_(1, target, scale * (label_smoothing - 1.0)).to(weight.dtype)


@torch.library.custom_op(
    "fat5::linear_cross_entropy_summed",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, bool with_gradients) -> (Tensor total, Tensor grad_hidden, Tensor grad_weight)",
)
def _summed(hidden, weight, labels, z_loss, label_smoothing, ignore_index, chunk, dtype, with_gradients):  # type: ignore[no-untyped-def]
    """The summed loss and, if asked for, its gradients with respect to hidden and weight (empty otherwise)."""
    settings = (with_gradients, z_loss, label_smoothing, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        compute = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=compute, device=hidden.device)
        grad_hidden = torch.empty_like(hidden if with_gradients else hidden[:0])
        grad_weight = torch.zeros_like(weight if with_gradients else weight[:0], dtype=compute)
        narrow = weight.to(dtype)
        for rows in _chunks(len(labels), chunk):
            loss, grad_logits = _chunk_loss(hidden[rows], narrow, labels[rows], None, *settings)
            total += loss.sum()
            if grad_logits is not None:
                _accumulate(grad_logits, hidden[rows], narrow, grad_hidden[rows], grad_weight)
        return total, grad_hidden, grad_weight.to(_kept_dtype(weight))


def _kept_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the gradient until it is scaled: a sum over many tokens overflows float16, their mean does not."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def _accumulate(grad_logits: Tensor, hidden: Tensor, weight: Tensor, grad_hidden: Tensor, grad_weight: Tensor) -> None:
    """grad_hidden = grad_logits @ weight; grad_weight += grad_logits.T @ hidden, summed in grad_weight's dtype."""
    hidden = hidden.to(weight.dtype)
    if serves(grad_logits, weight):
        grad_hidden.copy_(product(grad_logits, weight))
        grad_weight += product(grad_logits.t(), hidden)
        return
    if grad_hidden.dtype == weight.dtype and grad_hidden.is_contiguous():
        torch.mm(grad_logits, weight, out=grad_hidden)
    else:
        grad_hidden.copy_(grad_logits @ weight)
    if grad_weight.dtype == grad_logits.dtype:
        grad_weight.addmm_(grad_logits.t(), hidden)
    elif grad_weight.is_cuda and _adds_in_float32(grad_weight.device, hidden.dtype):
        torch.addmm(grad_weight, grad_logits.t(), hidden, out_dtype=torch.float32, out=grad_weight)
    else:
        # A sum over many tokens overflows float16.
        wide = grad_weight.dtype if hidden.dtype == torch.float16 else hidden.dtype
        grad_weight += grad_logits.t().to(wide) @ hidden.to(wide)


@lru_cache(maxsize=8)
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds a product of narrow matrices to a float32 one in one call: some versions refuse."""
    one = torch.ones(16, 16, device=device, dtype=dtype)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, one.t(), one, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


@_summed.register_fake
def _(hidden, weight, labels, z_loss, label_smoothing, ignore_index, chunk, dtype, with_gradients):  # type: ignore[no-untyped-def]
    if not with_gradients:
        hidden, weight = hidden[:0], weight[:0]
    total = hidden.new_empty((), dtype=torch.promote_types(dtype, torch.float32))
    return total, torch.empty_like(hidden), torch.empty_like(weight, dtype=_kept_dtype(weight))


def _save_gradients(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*output[1:])
    ctx.weight_dtype = inputs[1].dtype
    # Autograd would make zeros, as large as the weight, for outputs that nobody differentiates.
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx, grad_total, grad_of_hidden, grad_of_weight):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # The forward pass computed the gradients; here they are constants.
        raise RuntimeError("linear_cross_entropy has no second derivative; call backward without create_graph")
    if grad_total is None:
        return (None,) * 9
    grad_hidden, grad_weight = ctx.saved_tensors
    return (
        (grad_hidden * grad_total).to(grad_hidden.dtype),
        (grad_weight * grad_total).to(ctx.weight_dtype),
        *(None,) * 7,
    )


_summed.register_autograd(_scale_gradients, setup_context=_save_gradients)


@torch.library.custom_op("fat5::linear_cross_entropy_per_token", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def _per_token(hidden, weight, labels, z_loss, label_smoothing, ignore_index, chunk, dtype):  # type: ignore[no-untyped-def]
    """Each token's loss, (T,)."""
    settings = (False, z_loss, label_smoothing, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        loss = torch.zeros(labels.shape, dtype=torch.promote_types(dtype, torch.float32), device=hidden.device)
        narrow = weight.to(dtype)
        for rows in _chunks(len(labels), chunk):
            loss[rows] = _chunk_loss(hidden[rows], narrow, labels[rows], None, *settings)[0]
        return loss


@_per_token.register_fake
def _(hidden, weight, labels, z_loss, label_smoothing, ignore_index, chunk, dtype):  # type: ignore[no-untyped-def]
    return labels.new_empty(labels.shape, dtype=torch.promote_types(dtype, torch.float32))


@torch.library.custom_op(
    "fat5::linear_cross_entropy_per_token_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor grad_hidden, Tensor grad_weight)",
)
def _per_token_backward(grad, hidden, weight, labels, z_loss, label_smoothing, ignore_index, chunk, dtype):  # type: ignore[no-untyped-def]
    """Gradients of hidden and weight, from logits computed again."""
    settings = (True, z_loss, label_smoothing, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        compute = torch.promote_types(dtype, torch.float32)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=compute)
        narrow = weight.to(dtype)
        for rows in _chunks(len(labels), chunk):
            _, grad_logits = _chunk_loss(hidden[rows], narrow, labels[rows], grad[rows], *settings)
            assert grad_logits is not None
            _accumulate(grad_logits, hidden[rows], narrow, grad_hidden[rows], grad_weight)
        return grad_hidden, grad_weight.to(weight.dtype)


@_per_token_backward.register_fake
def _(grad, hidden, weight, labels, z_loss, label_smoothing, ignore_index, chunk, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(hidden), torch.empty_like(weight)


def _save_inputs(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]


def _gradients_per_token(ctx, grad):  # type: ignore[no-untyped-def]
    return *_per_token_backward(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 6


_per_token.register_autograd(_gradients_per_token, setup_context=_save_inputs)
