"""Gradient checkpointing: which activations of a block the backward pass finds in memory, and which it computes again.

none        all are kept
selective   the block's input, attention's output and the products around it; norms, activations, dropout and the
            feed-forward, whose inner width is the largest part of a block, are computed again
block       the block's input
"""

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from fat5.model.layers import Block

KEPT = ("fat5::attention", "fat5::triton_work_lists", "fat5::hopper_strips")
"""Operators whose outputs `selective` keeps: the quadratic part, and the few numbers that its backward pass shares."""

PRODUCTS = ("aten::mm", "aten::addmm", "fat5::product")
"""Matrix products, activations by weights (in, out), of which those of the feed-forward are computed again."""


def checkpoint_activations(model: Any, policy: str) -> None:
    """Applies a policy (none, selective, block) to the blocks of a model; losses and gradients stay as they are.

    Args:
        model: of FAT5, with or without adapters; its configuration has d_ff.
    """
    how: dict[str, Any] | None = None if policy == "none" else {"use_reentrant": False}
    if how is not None and policy == "selective":
        how["context_fn"] = _selective_contexts(model.config.d_ff)
    for module in model.modules():
        if isinstance(module, Block):
            module.checkpointing = how


def _selective_contexts(d_ff: int) -> Any:
    """A function for `torch.utils.checkpoint`; a plain one, which torch.compile can trace."""
    inner = (d_ff, 2 * d_ff)  # one projection, or gate and up joined

    def policy(_context: Any, operator: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
        name = operator.name()
        kept = name in KEPT or (name in PRODUCTS and not any(size in inner for size in arguments[-1].shape))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    # Names the policy in the compiler's cache, which otherwise would not keep what it compiled. Part of it: KEPT and
    # PRODUCTS, so that another choice is another entry.
    contexts.cache_hash = f"fat5 {KEPT} {PRODUCTS} {inner}"  # type: ignore[attr-defined]
    return contexts
