"""The blocks of a T5 stack, on packed tokens (T, d) or rows (B, L, d); parameters have Hugging Face T5's names."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

from fat5 import ops
from fat5.model.configuration import FAT5Config
from fat5.model.padding import Segments, Trace
from fat5.ops import RelativeBias
from fat5.ops.choice import uses_triton


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        # A float32 wo makes the hidden states of a float16 model float32, while its projections take float16.
        weight = self.weight
        if weight.dtype != hidden.dtype and weight.dtype in (torch.float16, torch.bfloat16):
            return ops.rms_norm(hidden, weight.to(hidden.dtype), self.eps).to(weight.dtype)
        return ops.rms_norm(hidden, weight, self.eps)


class Embedding(nn.Embedding):
    """nn.Embedding with a deterministic gradient, compiled or not."""

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight)


class Attention(nn.Module):
    """Multi-head attention without biases and without 1/sqrt(d) (T5 folds it into the initialisation of q)."""

    def __init__(self, config: FAT5Config, layer: int, has_relative_attention_bias: bool = False) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads, self.width, self.layer = config.num_heads, config.d_kv, layer
        self.dropout = config.attention_dropout
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.has_relative_attention_bias = has_relative_attention_bias
        if has_relative_attention_bias:
            self.relative_attention_num_buckets = config.relative_attention_num_buckets
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(
        self,
        hidden: Tensor,
        segments: Segments,
        *,
        memory: Tensor | None = None,
        memory_segments: Segments | None = None,
        bias: RelativeBias | Tensor | None = None,
        causal: bool = False,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Attends from `hidden` to itself, or to `memory`; `cache` (of transformers) keeps keys and values of rows.

        `weights` is a list to which the attention weights (B, H, Lq, Lk) are appended, if the keys are `formed`.
        """
        query = self._heads(ops.linear(self.q, hidden))
        if rotation is not None:
            query = ops.rotary(query, *rotation)
        key, value = self._keys_values(hidden if memory is None else memory, memory is not None, rotation, cache)
        key_segments = segments if memory_segments is None else memory_segments
        dropout_p = self.dropout if self.training else 0.0
        if segments.cu_seqlens is not None and key_segments.mask is None:
            out = ops.attention(
                query, key, value, bias=bias, causal=causal, dropout_p=dropout_p,
                cu_seqlens_q=segments.cu_seqlens, cu_seqlens_k=key_segments.cu_seqlens,
                max_seqlen_q=segments.max_seqlen, max_seqlen_k=key_segments.max_seqlen,
                shared=None if torch.compiler.is_compiling() else segments.shared,
            )  # fmt: skip
        else:
            if segments.cu_seqlens is not None:  # whole rows
                query, key, value = (x.unflatten(0, (len(key_segments.mask), -1)) for x in (query, key, value))  # type: ignore[arg-type]
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            if key_segments.formed:
                formed = ops.attention_weights(query, key, bias=bias, causal=causal, key_padding_mask=key_segments.mask)
                formed = F.dropout(formed, dropout_p)
                if weights is not None:
                    weights.append(formed)
                out = formed.to(value.dtype) @ value
            else:
                out = ops.attention(
                    query, key, value, bias=bias, causal=causal, dropout_p=dropout_p, key_padding_mask=key_segments.mask
                )
            out = out.transpose(1, 2)
        return ops.linear(self.o, out.reshape(*hidden.shape[:-1], self.heads * self.width))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, self.width)

    def _keys_values(
        self, source: Tensor, crosses: bool, rotation: tuple[Tensor, Tensor] | None, cache: Any
    ) -> tuple[Tensor, Tensor]:
        if cache is not None and crosses and cache.is_updated.get(self.layer):
            kept = cache.cross_attention_cache.layers[self.layer]
            return kept.keys.transpose(1, 2), kept.values.transpose(1, 2)
        key, value = self._heads(ops.linear(self.k, source)), self._heads(ops.linear(self.v, source))
        if rotation is not None:
            key = ops.rotary(key, *rotation)
        if cache is not None:
            side = cache.cross_attention_cache if crosses else cache.self_attention_cache
            key, value = (
                x.transpose(1, 2) for x in side.update(key.transpose(1, 2), value.transpose(1, 2), self.layer)
            )
            if crosses:
                cache.is_updated[self.layer] = True
        return key, value


def learned_bias(attention: Any, device: torch.device, *, bidirectional: bool, max_distance: int) -> RelativeBias:
    """The bias of an attention, ours or stock T5's, from its (num_buckets, H) table.

    An embedding with an adapter, a hook, or weights on disk (device_map) is called: its `weight` is not the table.
    """
    table = attention.relative_attention_bias
    if ops.is_plain(table, nn.Embedding):
        table = table.weight
    else:
        table = table(torch.arange(attention.relative_attention_num_buckets, device=device))
    return RelativeBias.from_table(table, bidirectional=bidirectional, max_distance=max_distance)


def has_active_hooks(module: nn.Module) -> bool:
    """Whether a call does more than the forward; transformers leaves inactive hooks behind after recording hidden
    states or attention weights.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(getattr(hook, "__module__", "") != output_capturing.__name__ for hook in hooks)


class HeadProjection(nn.Linear):
    """A projection of a head, with a bias; a class of its own for its initialisation."""


class Residual(nn.Module):
    """hidden + dropout(part(norm(hidden))), with a part called SelfAttention, EncDecAttention or DenseReluDense."""

    def __init__(self, config: FAT5Config, **part: nn.Module) -> None:
        super().__init__()
        [(self.name, module)] = part.items()
        self.add_module(self.name, module)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = ops.Dropout(config.dropout_rate)

    def forward(self, hidden: Tensor, *args: Any, **how: Any) -> Tensor:
        return hidden + self.dropout(getattr(self, self.name)(self.layer_norm(hidden), *args, **how))


class FeedForward(nn.Module):
    """T5 v1.0's wo(act(wi x)); the parameters are called wi and wo."""

    def __init__(self, config: FAT5Config) -> None:
        super().__init__()
        self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = ops.Dropout(config.dropout_rate)
        self.act = ACT2FN[config.dense_act_fn]

    def forward(self, hidden: Tensor) -> Tensor:
        return _project_safely(self.wo, self.dropout(self.act(ops.linear(self.wi, hidden))))


class GatedFeedForward(nn.Module):
    """T5 v1.1's wo(act(wi_0 x) * wi_1 x)."""

    def __init__(self, config: FAT5Config) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = ops.Dropout(config.dropout_rate)
        self.act = None if config.dense_act_fn == "gelu_new" else ACT2FN[config.dense_act_fn]

    def forward(self, hidden: Tensor) -> Tensor:
        if self.act is None:
            inner = gated(self.wi_0, self.wi_1, hidden)
        else:
            inner = self.act(ops.linear(self.wi_0, hidden)) * ops.linear(self.wi_1, hidden)
        return _project_safely(self.wo, self.dropout(inner))


def gated(gate: nn.Module, up: nn.Module, hidden: Tensor) -> Tensor:
    """gelu(gate(hidden)) * up(hidden), the tanh form of GELU."""
    plain = torch.compiler.is_compiling() and hidden.is_cuda and uses_triton("geglu_joined", hidden)
    if plain and all(ops.is_plain(layer, nn.Linear) and layer.bias is None for layer in (gate, up)):
        # One matrix product twice as wide; the kernel that casts the weights also joins them.
        return ops.geglu_joined(F.linear(hidden, torch.cat([gate.weight, up.weight])))  # type: ignore[list-item]
    return ops.geglu(ops.linear(gate, hidden), ops.linear(up, hidden))


class Block(GradientCheckpointingLayer):
    """Self-attention, cross-attention in a decoder, feed-forward."""

    checkpointing: dict[str, Any] | None = None
    """Keyword arguments of torch.utils.checkpoint (activations.py), called inside `forward`: what surrounds it, as
    FSDP2's gathering of weights does, is not done again."""

    def __init__(self, config: FAT5Config, layer: int, is_decoder: bool, has_relative_attention_bias: bool) -> None:
        super().__init__()
        self.is_decoder = is_decoder
        own = Attention(config, layer, has_relative_attention_bias)
        self.layer = nn.ModuleList([Residual(config, SelfAttention=own)])
        if is_decoder:
            self.layer.append(Residual(config, EncDecAttention=Attention(config, layer)))
        feed_forward = GatedFeedForward(config) if config.is_gated_act else FeedForward(config)
        self.layer.append(Residual(config, DenseReluDense=feed_forward))

    def forward(self, hidden: Tensor, bias: Tensor | None, memory: Tensor | None, **how: Any) -> Tensor:
        """Hidden states after the block; `how` is documented at `_run`."""
        if self.checkpointing is None or not self.training:
            return self._run(hidden, bias, memory, **how)
        return checkpoint(partial(self._run, **how), hidden, bias, memory, **self.checkpointing)  # type: ignore[no-any-return]

    def _run(
        self,
        hidden: Tensor,
        bias: Tensor | None,
        memory: Tensor | None,
        *,
        relative: bool,
        segments: Segments,
        rotation: tuple[Tensor, Tensor] | None,
        causal: bool,
        memory_segments: Segments | None,
        past_key_values: Any,
        trace: Trace,
    ) -> Tensor:
        """`bias` is the vector of a RelativeBias if `relative`: reentrant gradient checkpointing passes gradients only
        to positional arguments that are tensors.
        """
        known = RelativeBias(bias) if relative and bias is not None else bias
        cache, own, across = past_key_values, trace.attentions, trace.cross_attentions
        hidden = _clamp(
            self.layer[0](hidden, segments, bias=known, causal=causal, rotation=rotation, cache=cache, weights=own)
        )
        if self.is_decoder and memory is not None:
            hidden = _clamp(
                self.layer[1](
                    hidden, segments, memory=memory, memory_segments=memory_segments, cache=cache, weights=across
                )
            )
        return _clamp(self.layer[-1](hidden))


def _project_safely(wo: nn.Linear, hidden: Tensor) -> Tensor:
    """wo(hidden), in float32 if wo is float32 (`_keep_in_fp32_modules`), even under float16 autocast: T5 overflows
    float16 here.
    """
    weight, device = getattr(wo, "weight", None), hidden.device.type
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return wo(hidden)  # quantised: it casts its input itself
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        with torch.autocast(device, enabled=False):
            return wo(hidden.to(weight.dtype))
    if weight.dtype == torch.float32 and hidden.dtype == torch.float16:
        hidden = hidden.float()
    return ops.linear(wo, hidden)


def _clamp(hidden: Tensor) -> Tensor:
    """Clamps float16 hidden states, as stock T5 does: to the largest float16, or 1000 below it if any is infinite."""
    if hidden.dtype != torch.float16:
        return hidden
    largest = torch.finfo(torch.float16).max
    bound = torch.where(torch.isinf(hidden).any(), largest - 1000, largest).to(hidden.dtype)
    return hidden.clamp(min=-bound, max=bound)
