"""The memory a run will take, counted from its shapes before it starts.

Counted: weights, gradients and optimizer state by parameter; the activations a backward pass needs by packed token; one
chunk of logits. Not counted: the allocator's rounding and what the libraries themselves load (about 1 GB on a GPU).
"""

from dataclasses import dataclass
from typing import Any

from fat5.train.config import PretrainConfig

GIB = 1 << 30

# Bytes of optimizer state for a parameter: float32 moments, two for the Adam family, one for Muon's matrices, row and
# column sums (next to nothing) for Adafactor; Sophia keeps a moment and a curvature.
STATE_BYTES = {"adamw_scale": 8, "adamw": 8, "lamb": 8, "sophia": 8, "muon": 4, "adafactor": 0}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def plan_memory(config: PretrainConfig, model: Any, logits_rows: int) -> MemoryPlan:
    """The plan for a resolved configuration.

    Args:
        config: resolved, its precision too.
        model: a model of that configuration; it may be on the meta device.
        logits_rows: rows of logits that exist at a time (`fat5.ops.linear_cross_entropy`).
    """
    parameters = model.num_parameters()
    pure = config.precision == "bf16-pure"
    weight_bytes = 2 if pure else 4
    state = STATE_BYTES[config.optimizer.name]
    if config.optimizer.state_dtype in ("bfloat16", "float16") and config.optimizer.name == "adamw_scale":
        state -= 2
    if pure and config.optimizer.name == "adamw_scale" and config.optimizer.kahan is not False:
        state += 2
    activation_bytes = 4 if config.precision == "fp32" else 2
    packs = config.data.packs_per_micro_batch
    # Under autocast the weights are cast once a step and the casts are kept for the backward pass.
    casts = 2 * parameters if config.precision in ("bf16", "fp16") else 0
    return MemoryPlan(
        weights=weight_bytes * parameters + casts,
        gradients=weight_bytes * parameters,
        optimizer=state * parameters,
        activations=activations(
            model.config,
            packs * config.data.encoder_tokens,
            packs * config.data.decoder_tokens,
            activation_bytes,
            config.gradient_checkpointing,
        ),
        logits=2 * 4 * logits_rows * model.config.vocab_size,
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
