"""T5's two stacks and the models without a head: the encoder alone, and the encoder with its decoder."""

import copy
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqModelOutput,
)
from transformers.utils import ModelOutput

from fat5.model.configuration import COUNTED_FROM_THE_FIRST_TOKEN
from fat5.model.layers import Embedding
from fat5.model.padding import Segments, Trace, check_mask, keep, kept_positions, run_packed
from fat5.model.pretrained import FAT5PreTrainedModel, refuse_given
from fat5.model.stack import Stack
from fat5.ops import is_recorded

# Weights of a seq2seq checkpoint, or of a head, that an encoder does not need.
NOT_OF_AN_ENCODER = [
    r"^(transformer\.)?decoder\.", r"^lm_head\.", r"^classifier\.", r"^classification_head\.", r"^qa_outputs\.",
]  # fmt: skip
# Weights that a model with a decoder but no language-model head does not need.
NOT_WITHOUT_A_HEAD = [*FAT5PreTrainedModel._keys_to_ignore_on_load_unexpected, r"^lm_head\."]


class Encoder(Stack):
    """The encoder stack, also callable on padded rows as transformers' generation does."""

    main_input_name = "input_ids"
    # Whether anybody reads the states at padding; a decoder does not.
    padding_is_read = True

    @property
    def computes_padding(self) -> bool:
        """Whether states at padding are computed, as stock T5 does, or left out and zero."""
        asked = self.config.compute_padding
        if self.config.position_encoding in COUNTED_FROM_THE_FIRST_TOKEN:
            return False
        return self.padding_is_read if asked is None else asked

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        segments: Segments | None = None,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Packed with `segments`: hidden states (T, d). On rows: a BaseModelOutput with (B, L, d); states at padding
        are zeros unless the encoder `computes_padding`.
        """
        rows = input_ids if inputs_embeds is None else inputs_embeds
        if rows is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")
        if segments is not None:
            return super().forward(rows, segments)
        trace, whole = Trace.of(self.config, output_hidden_states, output_attentions), self.computes_padding
        check_mask("attention_mask", attention_mask, rows)
        if is_recorded() or trace.attentions is not None:
            mask = None if attention_mask is None else attention_mask.bool()
            kept = None if whole or mask is None else kept_positions(mask)
            trace.to_rows = partial(keep, kept=kept)
            hidden = keep(super().forward(rows, Segments(None, rows.shape[1], mask, formed=True), trace=trace), kept)
        else:
            hidden = run_packed(super().forward, rows, attention_mask, whole=whole, causal=False, trace=trace)
        states, attentions, _ = trace.kept()
        output = BaseModelOutput(last_hidden_state=hidden, hidden_states=states, attentions=attentions)
        return output.to_tuple() if return_dict is False else output


class Decoder(Stack):
    """The decoder stack, also callable on padded rows as transformers' decoders are."""

    main_input_name = "input_ids"

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        segments: Segments | None = None,
        *,
        memory_segments: Segments | None = None,
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
        """Packed with `segments` and `memory_segments`: hidden states (T, d). On rows: a
        BaseModelOutputWithPastAndCrossAttentions with (B, U, d).
        """
        rows = input_ids if inputs_embeds is None else inputs_embeds
        if rows is None:
            raise ValueError("decoder_input_ids: expected them, decoder_inputs_embeds or labels, got none of them")
        memory = encoder_hidden_states
        if segments is not None:
            return super().forward(rows, segments, memory=memory, memory_segments=memory_segments)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        trace = Trace.of(self.config, output_hidden_states, output_attentions)
        masks_scores = attention_mask is not None and attention_mask.dim() == 4
        if past_key_values is None and not masks_scores:
            check_mask("attention_mask", attention_mask, rows)
        if memory is not None:
            check_mask("attention_mask of the encoder's tokens", encoder_attention_mask, memory)
        formed = is_recorded() or trace.attentions is not None
        if past_key_values is not None or masks_scores or formed:
            masks = attention_mask, encoder_attention_mask
            hidden = self._run_rows(rows, memory, *masks, past_key_values, formed, trace)
        else:
            hidden = run_packed(
                super().forward, rows, attention_mask, whole=True, causal=True, trace=trace, memory=memory,
                memory_mask=encoder_attention_mask,
            )  # fmt: skip
        states, attentions, cross_attentions = trace.kept()
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=states,
            attentions=attentions,
            cross_attentions=cross_attentions,
        )
        return output.to_tuple() if return_dict is False else output

    def _run_rows(
        self,
        rows: Tensor,
        memory: Tensor | None,
        mask: Tensor | None,
        memory_mask: Tensor | None,
        cache: Any,
        formed: bool,
        trace: Trace,
    ) -> Tensor:
        """Rows (B, L) that follow those in the cache, if there is one; `mask` covers both, (B, Lk) or, as generate
        makes it for a static cache, (B, 1, L, Lk).
        """
        memory_segments = None
        if memory is not None:
            memory_mask = None if memory_mask is None else memory_mask.bool()
            asks = not (formed or memory_mask is None or torch.compiler.is_compiling())
            unreadable = asks and not bool(memory_mask.any(dim=1).all())  # type: ignore[union-attr]
            memory_segments = Segments(None, memory.shape[1], memory_mask, formed or unreadable)
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
        segments = Segments(None, rows.shape[1], mask, formed or blind)
        return super().forward(rows, segments, memory=memory, memory_segments=memory_segments, cache=cache, trace=trace)


class FAT5EncoderModel(FAT5PreTrainedModel):
    """The encoder alone, as transformers' T5EncoderModel; or on packed documents."""

    _keys_to_ignore_on_load_unexpected: ClassVar = NOT_OF_AN_ENCODER
    _tied_weights_keys: ClassVar = {"encoder.embed_tokens.weight": "shared.weight"}

    def __init__(self, config: Any) -> None:
        config = copy.deepcopy(config)
        config.is_encoder_decoder = config.use_cache = False
        super().__init__(config)
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config, is_decoder=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        return_dict: bool | None = None,
        **asked: Any,
    ) -> Any:
        """Hidden states of every token: rows (B, L, d), with padding as in transformers (`config.compute_padding`);
        packed (T, d), from input_ids (T,) or inputs_embeds (T, d), cu_seqlens int32 (N+1,) and max_seqlen, a bound of
        the documents' lengths. `asked` may hold output_attentions and output_hidden_states.

        Raises:
            ValueError: an argument is missing, or one is given that packed documents do not take.
        """
        output = self.encode(input_ids, attention_mask, inputs_embeds, cu_seqlens, max_seqlen, **asked)
        return self.returned(output, return_dict)


class EncoderDecoder(FAT5PreTrainedModel):
    """Shared embeddings, encoder and decoder: the base of every model with a decoder."""

    _tied_weights_keys: ClassVar = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: Any, has_decoder: bool = True) -> None:
        if has_decoder:
            config.is_encoder_decoder = True  # nanoT5 writes False, by which `generate` would take it for a decoder
        super().__init__(config)
        self.shared = Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config, is_decoder=False)
        if has_decoder:
            self.encoder.padding_is_read = False
            self.decoder = Decoder(config, is_decoder=True)

    def get_decoder(self) -> Decoder:
        return self.decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        decoder_cu_seqlens: Tensor | None = None,
        decoder_max_seqlen: int | None = None,
        return_dict: bool | None = None,
        **asked: Any,
    ) -> Any:
        """Padded rows as in transformers' T5Model, or packed documents; last_hidden_state is the decoder's, (B, U, d)
        or (U, d).

        Packed (`cu_seqlens` given): input_ids (T,) and decoder_input_ids (U,), or embeddings (T, d) and (U, d);
        cu_seqlens and decoder_cu_seqlens int32 (N+1,), max_seqlen and decoder_max_seqlen ints that bound the documents'
        lengths. The encoder runs unless its outputs are given. `asked` may hold output_attentions and
        output_hidden_states.

        Raises:
            ValueError: an argument is missing, or one is given that packed documents do not take.
        """
        bounds = dict(
            max_seqlen=max_seqlen, decoder_cu_seqlens=decoder_cu_seqlens, decoder_max_seqlen=decoder_max_seqlen
        )
        if cu_seqlens is not None:
            for name, value in bounds.items():
                if value is None:
                    raise ValueError(f"{name}: packed documents need it beside cu_seqlens, got None")
            refuse_given(
                "packed documents (cu_seqlens) take none; give padded rows", encoder_outputs=encoder_outputs,
                decoder_attention_mask=decoder_attention_mask, past_key_values=past_key_values,
                use_cache=use_cache or None,
            )  # fmt: skip
            memory = self.encode(input_ids, attention_mask, inputs_embeds, cu_seqlens, max_seqlen, **asked)[0]
            decoded = self.decoder(
                decoder_input_ids, Segments(decoder_cu_seqlens, decoder_max_seqlen),  # type: ignore[arg-type]
                encoder_hidden_states=memory, memory_segments=Segments(cu_seqlens, max_seqlen),  # type: ignore[arg-type]
                inputs_embeds=decoder_inputs_embeds,
            )  # fmt: skip
            output = Seq2SeqModelOutput(last_hidden_state=decoded, encoder_last_hidden_state=memory)
            return self.returned(output, return_dict)
        refuse_given("padded rows take none; give cu_seqlens beside it", **bounds)
        if encoder_outputs is None:
            encoder_outputs = self.encode(input_ids, attention_mask, inputs_embeds, **asked)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            parts = encoder_outputs.to_tuple() if isinstance(encoder_outputs, ModelOutput) else encoder_outputs
            encoder_outputs = BaseModelOutput(*parts[:3])
        self.refuse_unread_embeddings()
        memory = encoder_outputs.last_hidden_state
        decoded = self.decoder(
            decoder_input_ids, inputs_embeds=decoder_inputs_embeds, attention_mask=decoder_attention_mask,
            encoder_hidden_states=memory, encoder_attention_mask=attention_mask,
            past_key_values=past_key_values, use_cache=use_cache, **asked,
        )  # fmt: skip
        output = Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )
        return self.returned(output, return_dict)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """(B, U) labels to decoder inputs, shifted right."""
        return self._shift_right(labels)


class FAT5Model(EncoderDecoder):
    """The encoder-decoder without a head, as transformers' T5Model."""

    _keys_to_ignore_on_load_unexpected: ClassVar = NOT_WITHOUT_A_HEAD

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.post_init()
