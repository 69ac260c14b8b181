"""The memory a run will take, counted from its shapes before it starts, and the refusal of one that cannot fit.

Counted: weights, gradients and optimizer state by parameter; the activations a backward pass needs by packed token; one
chunk of logits; the copy that a checkpoint is written from while training goes on (in the host's memory); on a GPU a
flat amount for the libraries. Not counted: the allocator's rounding.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch

from fat5.data import BatchConfig
from fat5.errors import ConfigurationError
from fat5.machine import GIB, available_memory
from fat5.ops.linear_cross_entropy import default_chunk_size
from fat5.train.config import RunConfig

# Bytes of optimizer state for a parameter: float32 moments, two for the Adam family, one for Muon's matrices, row and
# column sums (next to nothing) for Adafactor.
STATE_BYTES = {"adamw_scale": 8, "adamw": 8, "lamb": 8, "muon": 4, "adafactor": 0}

LIBRARIES = {"cpu": 0, "cuda": GIB // 2}
"""Compiled kernels and scratch buffers of a GPU. On a CPU they are loaded before the plan is made."""

TIGHT = 0.9
"""Share of the free memory above which a plan is called tight."""

LOWER = "Lower data.encoder_tokens and data.decoder_tokens, set gradient_checkpointing, or take a smaller model.preset"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, beyond what the process has taken when it is made."""

    device: str
    """Type of the device: cpu or cuda"""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    checkpoint: int
    """The copy that a checkpoint is written from; on the host"""
    libraries: int

    @property
    def total(self) -> int:
        """Bytes on the device in all."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Purpose → bytes on the device."""
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "device"}
        return {name: size for name, size in named.items() if size and (name != "checkpoint" or self.device == "cpu")}

    def describe(self) -> str:
        """In GiB: the total and its parts."""
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts().items())
        return f"{self.total / GIB:.2f} GiB ({parts})"


def check_memory(plan: MemoryPlan, free: int | None) -> None:
    """Refuses a plan beyond what is free, on the device or for the checkpoints of a GPU's run on the host.

    Raises:
        ConfigurationError: it does not fit.
    """
    if free is not None and plan.total > free:
        raise ConfigurationError(
            f"the run needs about {plan.describe()}, and {free / GIB:.1f} GiB of memory are free", hint=LOWER
        )
    host = available_memory() if plan.device != "cpu" else None
    if host is not None and plan.checkpoint > host:
        raise ConfigurationError(
            f"a checkpoint is written from a copy of {plan.checkpoint / GIB:.1f} GiB, and {host / GIB:.1f} GiB of the "
            "host's memory are free",
            hint="Take a smaller model.preset, or give the job more memory",
        )


def plan_memory(
    config: RunConfig, batch: BatchConfig, model: Any, device: torch.device, processes: int = 1
) -> MemoryPlan:
    """The plan for a resolved configuration.

    Args:
        model: a model of that configuration; it may be on the meta device.
        processes: that train together; several sum their gradients in a copy.
    """
    stand_in = torch.empty(model.config.vocab_size, 0, device="cpu" if device.type == "cpu" else "meta")
    logits_rows = default_chunk_size(stand_in)
    parameters = model.num_parameters()
    pure = config.precision == "bf16-pure"
    weight_bytes = 2 if pure else 4
    state = STATE_BYTES[config.optimizer.name]
    if config.optimizer.state_dtype in ("bfloat16", "float16") and config.optimizer.name == "adamw_scale":
        state -= 2
    if pure and config.optimizer.name == "adamw_scale" and config.optimizer.kahan is not False:
        state += 2
    activation_bytes = 4 if config.precision == "fp32" else 2
    packs = batch.packs_per_micro_batch
    # Under autocast the weights are cast once a step and the casts are kept for the backward pass.
    casts = 2 * parameters if config.precision in ("bf16", "fp16") else 0
    return MemoryPlan(
        device=device.type,
        weights=weight_bytes * parameters + casts,
        gradients=weight_bytes * parameters * (2 if processes > 1 else 1),
        optimizer=state * parameters,
        activations=activations(
            model.config,
            packs * batch.encoder_tokens,
            packs * batch.decoder_tokens,
            activation_bytes,
            config.gradient_checkpointing,
        ),
        logits=2 * 4 * logits_rows * model.config.vocab_size,
        checkpoint=(weight_bytes + state) * parameters,
        libraries=LIBRARIES["cuda" if device.type == "cuda" else "cpu"],
    )


def activations(config: Any, encoder_tokens: int, decoder_tokens: int, size: int, checkpointing: bool) -> int:
    """Bytes of what the backward pass of one micro-batch needs, with numbers of `size` bytes.

    A token keeps, for self-attention, the block's input, its norm, q, k, v and the output of the heads; for
    cross-attention the same, with keys and values on the encoder's tokens; for a gated feed-forward its input, its
    norm, gate, up and their product. Checkpointing keeps block inputs and recomputes one block at a time.
    """
    d, a, f = config.d_model, config.num_heads * config.d_kv, config.d_ff
    feed_forward = 2 * d + (3 if config.is_gated_act else 2) * f
    encoder_block = (2 * d + 4 * a) + feed_forward
    decoder_block = (2 * d + 4 * a) + (2 * d + 2 * a) + feed_forward
    cross_keys = 2 * a
    layers, decoder_layers = config.num_layers, config.num_decoder_layers
    if checkpointing:
        kept = d * (layers * encoder_tokens + decoder_layers * decoder_tokens)
        one = max(encoder_block * encoder_tokens, decoder_block * decoder_tokens + cross_keys * encoder_tokens)
        return size * (kept + one)
    return size * (
        layers * encoder_block * encoder_tokens
        + decoder_layers * (decoder_block * decoder_tokens + cross_keys * encoder_tokens)
    )
