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
from fat5.model.layers import Block
from fat5.ops.linear_cross_entropy import default_chunk_size
from fat5.optim.offload import BUFFERS, CHUNK
from fat5.train.config import CheckpointingName, RunConfig, shard_size
from fat5.train.world import World

# Bytes of optimizer state for a parameter: float32 moments, two for the Adam family, one for Muon's matrices, row and
# column sums (next to nothing) for Adafactor.
STATE_BYTES = {"adamw_scale": 8, "adamw": 8, "lamb": 8, "muon": 4, "adafactor": 0}

LIBRARIES = {"cpu": 0, "cuda": GIB // 2}
"""Compiled kernels and scratch buffers of a GPU. On a CPU they are loaded before the plan is made."""

TIGHT = 0.9
"""Share of the free memory above which a plan is called tight."""

LOWER = (
    "Lower data.encoder_tokens and data.decoder_tokens, set gradient_checkpointing to selective or block, or take a "
    "smaller model.preset"
)


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
    offloaded: int = 0
    """Optimizer state on the host"""

    @property
    def total(self) -> int:
        """Bytes on the device in all."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Purpose → bytes on the device."""
        elsewhere = ("device", "offloaded") if self.device == "cpu" else ("device", "offloaded", "checkpoint")
        named = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in elsewhere}
        return {name: size for name, size in named.items() if size}

    def describe(self, free: int | None = None) -> str:
        """In GiB: the total, its parts, and what is free."""
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts().items())
        return f"{self.total / GIB:.2f} GiB ({parts})" + (f" of {free / GIB:.1f} GiB free" if free is not None else "")


@dataclass(frozen=True)
class Weights:
    """The weights of a model as FSDP2 divides them: blocks one by one, the rest together."""

    parameters: int
    outside: int
    """Parameters outside of them"""
    block: int
    """Parameters of the largest"""
    travel_bytes: int
    """A weight of a block in a message: 2 under bf16, else 4"""

    @classmethod
    def of(cls, model: Any, precision: str) -> "Weights":
        """Those of a model, which may be on the meta device."""
        sizes = [sum(x.numel() for x in one.parameters()) for one in model.modules() if isinstance(one, Block)]
        parameters, travel = model.num_parameters(), 2 if precision.startswith("bf16") else 4
        return cls(parameters, parameters - sum(sizes), max(sizes), travel)


def check_memory(plan: MemoryPlan, free: int | None, host: bool = True) -> None:
    """Refuses a plan beyond what is free on the device, or on the host, if that is this machine.

    Raises:
        ConfigurationError: it does not fit.
    """
    if free is not None and plan.total > free:
        raise ConfigurationError(
            f"the run needs about {plan.describe()}, and {free / GIB:.1f} GiB of memory are free", hint=LOWER
        )
    room = available_memory() if host and plan.device != "cpu" else None
    if room is not None and plan.checkpoint + plan.offloaded > room:
        offloaded = f", the optimizer's state takes {plan.offloaded / GIB:.1f} GiB" if plan.offloaded else ""
        raise ConfigurationError(
            f"a checkpoint is written from a copy of {plan.checkpoint / GIB:.1f} GiB{offloaded}, and "
            f"{room / GIB:.1f} GiB of the host's memory are free",
            hint="Take a smaller model.preset, or give the job more memory",
        )


def plan_memory(config: RunConfig, batch: BatchConfig, model: Any, world: World) -> MemoryPlan:
    """The plan of one process for a resolved configuration.

    Args:
        model: a model of that configuration; it may be on the meta device.
        world: several processes sum their gradients in a copy; those of a shard divide weights, gradients and optimizer
            state (FSDP2).

    Raises:
        ConfigurationError: as `shard_size`.
    """
    device, shards = world.device, shard_size(config, world.launch)
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
    optimizer, offloaded = state * parameters // shards, 0
    if config.optimizer.offload:
        largest = max(weight.numel() for weight in model.parameters())
        optimizer, offloaded = min(optimizer, state * BUFFERS * max(CHUNK, largest) // shards), optimizer
    packs = batch.packs_per_micro_batch
    # Under autocast the weights are cast once a step and the casts are kept for the backward pass.
    casts = 2 * parameters if config.precision in ("bf16", "fp16") else 0
    weights, gradients = weight_bytes * parameters + casts, weight_bytes * parameters * (2 if world.size > 1 else 1)
    if shards > 1:
        # Whole are two blocks at a time, in the precision of the arithmetic, and what is outside the blocks; gradients
        # are divided with the last micro-batch.
        sizes = Weights.of(model, config.precision)
        outside = weight_bytes * sizes.outside
        weights = weight_bytes * parameters // shards + outside + casts * sizes.outside // parameters
        weights += 2 * sizes.travel_bytes * sizes.block
        one = world.size * packs == batch.packs_per_step
        gradients = weight_bytes * parameters // shards
        gradients += outside + 2 * weight_bytes * sizes.block if one else weight_bytes * parameters
    return MemoryPlan(
        device=device.type,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        offloaded=offloaded,
        activations=activations(
            model.config,
            packs * batch.encoder_tokens,
            packs * batch.decoder_tokens,
            activation_bytes,
            config.checkpointing,
            on_cpu=device.type == "cpu",
        )
        + _score_bias(model.config, batch.max_tokens),
        logits=2 * 4 * logits_rows * model.config.vocab_size,
        checkpoint=(weight_bytes + state) * parameters,
        libraries=LIBRARIES["cuda" if device.type == "cuda" else "cpu"],
    )


def activations(
    config: Any, encoder_tokens: int, decoder_tokens: int, size: int, policy: CheckpointingName, *, on_cpu: bool
) -> int:
    """Bytes of what the backward pass of one micro-batch needs, with numbers of `size` bytes.

    A token keeps, for self-attention, the block's input, its norm, q, k, v and the output of the heads; for
    cross-attention the same, with keys and values on the encoder's tokens; for a gated feed-forward its input, its
    norm, gate, up and their product. A CPU also keeps dropout's masks, and in 16 bits GELU's result. Under `selective`
    it keeps no norm and of the feed-forward its input only, under `block` the block's input; one block's rest is
    recomputed at a time.
    """
    d, a, f = config.d_model, config.num_heads * config.d_kv, config.d_ff
    feed_forward = 2 * d + (3 if config.is_gated_act else 2) * f
    feed_forward += f if on_cpu and config.is_gated_act and size < 4 else 0
    masks = on_cpu and config.dropout_rate > 0
    feed_forward += d + f if masks else 0
    own, cross = ((3 if masks else 2) * d + heads * a for heads in (4, 2))
    # Of an encoder's token, of a decoder's token, and of an encoder's token in a decoder's block.
    whole = (own + feed_forward, own + cross + feed_forward, 2 * a)
    kept = {"none": whole, "selective": (2 * d + 4 * a, 3 * d + 6 * a, 2 * a), "block": (d, d, 0)}[policy]

    def blocks(numbers: tuple[int, int, int]) -> tuple[int, int]:
        return numbers[0] * encoder_tokens, numbers[1] * decoder_tokens + numbers[2] * encoder_tokens

    (encoder_block, decoder_block), (encoder_kept, decoder_kept) = blocks(whole), blocks(kept)
    recomputed = max(encoder_block - encoder_kept, decoder_block - decoder_kept)
    return size * (config.num_layers * encoder_kept + config.num_decoder_layers * decoder_kept + recomputed)


def _score_bias(config: Any, longest: int) -> int:
    """Bytes of FIRE's bias, the only one that is a matrix of queries by keys, and of its network, in both stacks."""
    if config.position_encoding != "fire":
        return 0
    return 2 * 4 * longest**2 * (config.fire_width + 2 * config.num_heads + 6)
