"""The decoder: as the second half of a model, and called by itself."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from fat5.model.layout import Layout
from fat5.model.rows import Trace, check_mask, run_rows
from fat5.model.stack import Stack
from fat5.ops import is_recorded


class Decoder(Stack):
    """The decoder stack, also callable on padded rows as transformers' decoders are."""

    main_input_name = "input_ids"

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        layout: Layout | None = None,
        *,
        memory: Tensor | None = None,
        memory_layout: Layout | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Packed with `layout`, `memory` and `memory_layout`: hidden states (T, d). On rows: a
        BaseModelOutputWithPastAndCrossAttentions with (B, U, d).
        """
        rows = input_ids if inputs_embeds is None else inputs_embeds
        if rows is None:
            raise ValueError("decoder_input_ids: expected them, decoder_inputs_embeds or labels, got none of them")
        if layout is not None:
            return super().forward(rows, layout, memory=memory, memory_layout=memory_layout)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        trace = Trace.of(output_hidden_states, output_attentions)
        memory, masks = encoder_hidden_states, (attention_mask, encoder_attention_mask)
        masks_scores = attention_mask is not None and attention_mask.dim() == 4
        if past_key_values is not None or masks_scores:
            hidden = self._as_rows(rows, memory, *masks, past_key_values, trace)
        else:
            hidden, back = run_rows(
                super().forward, rows, attention_mask, whole=True, causal=True, trace=trace, memory=memory,
                memory_mask=encoder_attention_mask,
            )  # fmt: skip
            hidden = back(hidden)
        states, attentions, cross_attentions = trace.kept()
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=states,
            attentions=attentions,
            cross_attentions=cross_attentions,
        )
        return output.to_tuple() if return_dict is False else output

    def _as_rows(
        self,
        rows: Tensor,
        memory: Tensor | None,
        mask: Tensor | None,
        memory_mask: Tensor | None,
        cache: Any,
        trace: Trace,
    ) -> Tensor:
        """Rows (B, L) that follow those in the cache, if there is one; `mask` covers both, (B, Lk) or, as generate
        makes it for a static cache, (B, 1, L, Lk).
        """
        formed, memory_layout = is_recorded() or trace.attentions is not None, None
        if memory is not None:
            check_mask("attention_mask of the encoder's tokens", memory_mask, (memory.shape[0], memory.shape[1]))
            memory_mask = None if memory_mask is None else memory_mask.bool()
            asks = not (formed or memory_mask is None or torch.compiler.is_compiling())
            unreadable = asks and not bool(memory_mask.any(dim=1).all())  # type: ignore[union-attr]
            memory_layout = Layout(None, memory.shape[1], memory_mask, formed or unreadable)
        blind = False
        if mask is not None and mask.dim() == 2:
            mask = mask.bool()
            if not formed:
                first = mask.shape[1] - rows.shape[1]
                everything, seen = torch.stack([mask.all(), mask[:, : first + 1].any(dim=1).all()]).tolist()
                mask, blind = None if everything else mask, not seen
        elif mask is not None:
            blind = rows.shape[1] > 1
        # transformers counts the encoder's layers when it makes a cache; the decoder may be deeper.
        for side in () if cache is None else (cache.self_attention_cache, cache.cross_attention_cache):
            if type(side) is DynamicCache and side.layers:
                side.layers.extend(type(side.layers[0])() for _ in range(len(self.block) - len(side.layers)))
        layout = Layout(None, rows.shape[1], mask, formed or blind)
        return super().forward(rows, layout, memory=memory, memory_layout=memory_layout, cache=cache, trace=trace)
