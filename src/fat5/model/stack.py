"""A stack of blocks, encoder or decoder: embeds, encodes positions, runs the blocks, normalises."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fat5.model.configuration import FAT5Config
from fat5.model.layers import Block, Embedding, RMSNorm, learned_bias
from fat5.model.padding import Segments, Trace
from fat5.model.positions import AbsolutePositions, Fire, Rotary
from fat5.ops import Dropout, RelativeBias


class Stack(nn.Module):
    """An encoder, or a decoder (causal, with cross-attention), over packed tokens or rows."""

    def __init__(self, config: FAT5Config, is_decoder: bool) -> None:
        super().__init__()
        self.config, self.is_decoder = config, is_decoder
        self.embed_tokens = Embedding(config.vocab_size, config.d_model)
        layers = config.num_decoder_layers if is_decoder else config.num_layers
        learned = config.position_encoding == "t5"
        self.own_bias = learned and config.family == "umt5"
        self.block = nn.ModuleList(
            [Block(config, i, is_decoder, learned and (i == 0 or self.own_bias)) for i in range(layers)]
        )
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = Dropout(config.dropout_rate)
        if config.position_encoding == "fire":
            self.fire = Fire(config)
        elif config.position_encoding == "absolute":
            self.absolute = AbsolutePositions(config)
        elif config.position_encoding == "rope":
            self.rotary = Rotary(config)

    def forward(
        self,
        tokens: Tensor,
        segments: Segments,
        *,
        memory: Tensor | None = None,
        memory_segments: Segments | None = None,
        cache: Any = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Hidden states of every token, normalised.

        Args:
            tokens: ids, (T,) or (B, L) int64, or embeddings with a last dimension d_model.
            memory, memory_segments: the encoder's hidden states, for a decoder.
            cache: an EncoderDecoderCache; rows only. Its length is the position of the first token.
        """
        hidden = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        device = hidden.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
            # The residual stream too, as T5X trains T5: half the traffic of norms and sums (decision 0087).
            hidden = hidden.to(torch.bfloat16)
        offset = 0 if cache is None else cache.get_seq_length()
        encoding = self.config.position_encoding
        rotation = None
        if encoding in ("absolute", "rope"):
            positions = segments.positions(tokens) + offset
            if encoding == "absolute":
                self.absolute.check(segments.max_seqlen + (offset if isinstance(offset, int) else 0))
                hidden = hidden + self.absolute(positions).to(hidden.dtype)
            else:
                rotation = self.rotary(positions)
        # The blocks whose tables make the biases: the first for all, or each its own.
        sources = range(len(self.block)) if self.own_bias else [0]
        biases = [self._bias(segments, cache, offset, hidden, source) for source in sources]
        causal = self.is_decoder and cache is None
        if segments.masks_scores:  # the biases hold the mask
            segments, causal = replace(segments, mask=None), False
        hidden = self.dropout(hidden)
        trace = Trace() if trace is None else trace
        for number, block in enumerate(self.block):
            hidden = trace.passed(hidden)
            bias = biases[number if self.own_bias else 0]
            vector, relative = (bias.vector, True) if isinstance(bias, RelativeBias) else (bias, False)
            hidden = block(
                hidden, vector, memory, relative=relative, segments=segments, rotation=rotation,
                causal=causal, memory_segments=memory_segments, past_key_values=cache, trace=trace,
            )  # fmt: skip
        return trace.passed(self.dropout(self.final_layer_norm(hidden)))

    def _bias(
        self, segments: Segments, cache: Any, offset: Any, hidden: Tensor, source: int
    ) -> RelativeBias | Tensor | None:
        """The bias that attention adds to the scores; with a cache, or a mask of the scores, it includes the mask."""
        if cache is None and not segments.masks_scores:
            return self._relative_bias(segments.max_seqlen, source, hidden.device)
        # With a cache, queries start at `offset` and keys at 0: the mask is made here, (1, H|1, Lq, Lk), small in
        # decoding.
        length, device = hidden.shape[1], hidden.device
        is_static = getattr(cache, "is_compileable", False)
        capacity: int = cache.self_attention_cache.get_max_length() if is_static else offset + length
        queries = torch.arange(length, device=device)[:, None] + offset
        future = torch.arange(capacity, device=device)[None, :] > queries
        if self.config.position_encoding == "fire":
            bias = self.fire(length, capacity, offset)
        else:
            relative = self._relative_bias(capacity, source, device)
            no_bias = torch.zeros(1, 1, length, capacity, device=device)
            bias = relative.dense(length, capacity, offset) if isinstance(relative, RelativeBias) else no_bias
        lowest = torch.finfo(bias.dtype).min  # a finite number, as in stock T5
        if not segments.masks_scores:
            return bias.masked_fill(future, lowest)
        mask = segments.mask[..., :capacity]  # type: ignore[index]  # it hides the future too
        return torch.where(mask, bias, lowest) if mask.dtype == torch.bool else (bias + mask.to(bias)).clamp(min=lowest)

    def _relative_bias(self, max_length: int, source: int, device: torch.device) -> RelativeBias | Tensor | None:
        config = self.config
        if config.position_encoding == "t5":
            attention = self.block[source].layer[0].SelfAttention  # type: ignore[union-attr, index]
            reach = config.relative_attention_max_distance
            return learned_bias(attention, device, bidirectional=not self.is_decoder, max_distance=reach)
        if config.position_encoding == "alibi":
            asymmetric = config.alibi_asymmetric and not self.is_decoder
            return RelativeBias.alibi(config.num_heads, max(max_length - 1, 1), asymmetric, device=device)
        if config.position_encoding == "fire":
            return self.fire(max_length, max_length)
        return None
