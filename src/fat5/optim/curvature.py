"""The diagonal of the Hessian by finite differences, for optimizers that use curvature (Sophia)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DIFFERENCE = 1e-3
"""Half the distance of the two points; near the cube root of float32's ε, where truncation and rounding balance."""


@torch.no_grad()
def hessian_diagonal(
    weights: Sequence[Tensor], gradients: Callable[[], Sequence[Tensor]], *, seed: int
) -> list[Tensor]:
    """One Hutchinson sample of the Hessian's diagonal: z ⊙ Hz with z = ±1.

    H z is (∇L(w + δz) − ∇L(w − δz)) / 2δ, so first derivatives suffice and any op will do. The weights are restored
    exactly. Source: Hutchinson 1990; Liu et al. 2023 (Sophia), algorithm 1.

    Args:
        weights: float32 or wider parameters, changed and restored in place.
        gradients: gives ∇L at the current weights, one tensor a weight; must be deterministic (same batch and dropout).
        seed: of the random signs.

    Returns:
        One estimate a weight, of the weight's shape and dtype.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    signs = [torch.randint(0, 2, w.shape, generator=generator).to(w).mul_(2).sub_(1) for w in weights]
    kept = [weight.clone() for weight in weights]
    try:
        torch._foreach_add_(list(weights), signs, alpha=DIFFERENCE)
        with torch.enable_grad():
            ahead = [gradient.clone() for gradient in gradients()]
        torch._foreach_copy_(list(weights), kept)
        torch._foreach_add_(list(weights), signs, alpha=-DIFFERENCE)
        with torch.enable_grad():
            behind = list(gradients())
        torch._foreach_sub_(ahead, behind)
    finally:
        torch._foreach_copy_(list(weights), kept)
    torch._foreach_mul_(ahead, signs)
    torch._foreach_div_(ahead, 2 * DIFFERENCE)
    return ahead
