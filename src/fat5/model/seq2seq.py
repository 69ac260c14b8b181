"""FAT5ForConditionalGeneration: T5's encoder-decoder with its language-model head, packed inside."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import ModelOutput

from fat5 import ops
from fat5.model.layout import Layout, Padding, document_positions, shift_right
from fat5.model.pretrained import FAT5PreTrainedModel
from fat5.model.stack import Stack


@dataclass
class PackedLMOutput(ModelOutput):
    """What packed training returns.

    Args:
        loss: scalar, z-loss and label smoothing included.
        token_loss: (U,) float32, plain negative log-likelihood, 0 where ignored; with per_token=True.
        token_correct: (U,) bool, whether the label had the highest logit; with per_token=True.
    """

    loss: Tensor | None = None
    token_loss: Tensor | None = None
    token_correct: Tensor | None = None


class Encoder(Stack):
    """The encoder stack, also callable on padded rows as transformers' generation does."""

    main_input_name = "input_ids"

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        layout: Layout | None = None,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        every_layer: list[Tensor] | None = None,
        **ignored: Any,
    ) -> Any:
        """Packed with `layout`: hidden states (T, d). On rows: a BaseModelOutput with (B, L, d), zeros at padding."""
        if layout is not None and input_ids is not None:
            return super().forward(input_ids, layout, every_layer=every_layer)
        rows = input_ids if inputs_embeds is None else inputs_embeds
        if rows is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")
        kept: list[Tensor] | None = [] if output_hidden_states else None
        hidden, packing = run_rows(super().forward, rows, attention_mask, every_layer=kept)
        states = None if kept is None else tuple(packing(x) for x in kept)
        return BaseModelOutput(last_hidden_state=packing(hidden), hidden_states=states)


class FAT5ForConditionalGeneration(FAT5PreTrainedModel, GenerationMixin):
    """T5 with a language-model head.

    Forward takes either padded rows, with the signature and outputs of transformers' T5ForConditionalGeneration, or,
    when `cu_seqlens` is given, packed documents for training. Parameters bear the names and shapes of
    T5ForConditionalGeneration.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> Encoder:
        return self.encoder

    def get_decoder(self) -> Stack:
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
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        decoder_cu_seqlens: Tensor | None = None,
        decoder_max_seqlen: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        per_token: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> Any:
        """Padded rows as in transformers' T5, or packed documents.

        Packed (`cu_seqlens` given): input_ids (T,) and labels (U,) int64, cu_seqlens and decoder_cu_seqlens int32
        (N+1,),
        max_seqlen and decoder_max_seqlen ints that bound the documents' lengths. Decoder inputs are the labels shifted
        right inside each document; labels of -100 do not count. Returns a `PackedLMOutput`; no logits are made.

        The loss is the sum over the labels that count, divided by `num_items_in_batch`, or by their number.

        Raises:
            ValueError: an argument that the layout needs is missing.
        """
        if ignored.get("output_attentions"):
            raise ValueError("output_attentions: attention weights are never formed here, expected False or None")
        if cu_seqlens is not None:
            packed = dict(
                input_ids=input_ids, labels=labels, max_seqlen=max_seqlen,
                decoder_cu_seqlens=decoder_cu_seqlens, decoder_max_seqlen=decoder_max_seqlen,
            )  # fmt: skip
            for name, value in packed.items():
                if value is None:
                    raise ValueError(f"{name}: packed training needs it beside cu_seqlens, got None")
            return self._packed_forward(cu_seqlens, **packed, items=num_items_in_batch, per_token=per_token)  # type: ignore[arg-type]
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_hidden_states=bool(output_hidden_states),
            )
        memory = encoder_outputs[0]
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        rows = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        if rows is None:
            raise ValueError(
                "decoder_input_ids: expected decoder_input_ids, decoder_inputs_embeds or labels, got none of them"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and labels is None
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        kept: list[Tensor] | None = [] if output_hidden_states else None
        if past_key_values is not None:
            hidden = self._decode_with_cache(
                rows, decoder_attention_mask, memory, attention_mask, past_key_values, kept
            )
            states = None if kept is None else tuple(kept)
        else:
            hidden, packing = run_rows(
                self.decoder, rows, decoder_attention_mask, every_layer=kept, memory=memory, memory_mask=attention_mask
            )
            hidden = packing(hidden)
            states = None if kept is None else tuple(packing(x) for x in kept)
        logits = self.lm_head(self._scaled(hidden))
        loss = None if labels is None else self._loss_of_logits(logits, labels, num_items_in_batch)
        output = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            decoder_hidden_states=states,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoder_outputs[1] if len(encoder_outputs) > 1 else None,
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """(B, U) labels to decoder inputs, shifted right."""
        positions = torch.arange(labels.shape[1], device=labels.device)[None]
        return shift_right(labels, positions, *self._start_and_pad())

    def _packed_forward(
        self,
        cu_seqlens: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        max_seqlen: int,
        decoder_cu_seqlens: Tensor,
        decoder_max_seqlen: int,
        items: Tensor | int | None,
        per_token: bool,
    ) -> PackedLMOutput:
        layout, decoder_layout = Layout(cu_seqlens, max_seqlen), Layout(decoder_cu_seqlens, decoder_max_seqlen)
        memory = self.encoder(input_ids, layout)
        inputs = shift_right(labels, document_positions(decoder_cu_seqlens, len(labels)), *self._start_and_pad())
        hidden = self._scaled(self.decoder(inputs, decoder_layout, memory=memory, memory_layout=layout))
        total = ops.linear_cross_entropy(
            hidden, self.lm_head.weight, labels, reduction="sum",
            z_loss=float(self.config.z_loss), label_smoothing=float(self.config.label_smoothing),
        )  # fmt: skip
        output = PackedLMOutput(loss=total / _items(labels, items))
        if per_token:
            output["token_loss"], output["token_correct"] = ops.token_statistics(hidden, self.lm_head.weight, labels)
        return output

    def _decode_with_cache(
        self,
        rows: Tensor,
        mask: Tensor | None,
        memory: Tensor,
        memory_mask: Tensor | None,
        cache: Any,
        every_layer: list[Tensor] | None,
    ) -> Tensor:
        """Rows (B, L) that follow what the cache holds; `mask` covers the cache and the rows."""
        if mask is not None:
            mask = mask.bool()
            if mask.dim() != 2 or bool(mask.all()):
                mask = None
        # transformers counts the encoder's layers when it makes a cache; the decoder may be deeper.
        for side in (cache.self_attention_cache, cache.cross_attention_cache):
            if type(side) is DynamicCache and side.layers:
                side.layers.extend(type(side.layers[0])() for _ in range(len(self.decoder.block) - len(side.layers)))
        layout = Layout(None, rows.shape[1], mask)
        memory_layout = Layout(None, memory.shape[1], None if memory_mask is None else memory_mask.bool())
        return self.decoder(
            rows, layout, memory=memory, memory_layout=memory_layout, cache=cache, every_layer=every_layer
        )

    def _scaled(self, hidden: Tensor) -> Tensor:
        """T5 v1.0 ties its output to its embeddings and scales; v1.1 does neither."""
        return hidden * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else hidden

    def _loss_of_logits(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        flat, targets = logits.flatten(0, 1).float(), labels.to(logits.device).flatten()
        smoothing = float(self.config.label_smoothing)
        total = F.cross_entropy(flat, targets, label_smoothing=smoothing, reduction="sum")
        if self.config.z_loss > 0.0:
            total = total + self.config.z_loss * (torch.logsumexp(flat, dim=-1).square() * (targets != -100)).sum()
        return total / _items(targets, items)

    def _start_and_pad(self) -> tuple[int, int]:
        pad = self.config.pad_token_id if self.config.pad_token_id is not None else 0
        start = self.config.decoder_start_token_id
        return (pad if start is None else start), pad


def run_rows(
    stack: Any,
    rows: Tensor,
    mask: Tensor | None,
    *,
    every_layer: list[Tensor] | None = None,
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Runs a stack over padded rows (B, L[, d]), packed inside; returns its output and the way back to rows.

    A mask with holes in it cannot be packed without moving tokens, which relative positions would notice; such rows
    run as they are, and so does everything with a memory whose mask has holes.
    """
    shape = (rows.shape[0], rows.shape[1])
    padding = Padding.of(mask, shape, rows.device)
    how: dict[str, Any] = {"every_layer": every_layer}
    if memory is not None:
        memory_padding = Padding.of(memory_mask, (memory.shape[0], memory.shape[1]), rows.device)
        if memory_padding is None:
            padding = None
        elif padding is not None:
            how |= {"memory": memory_padding.pack(memory), "memory_layout": memory_padding.layout}
        if padding is None:
            kept = None if memory_mask is None else memory_mask.bool()
            how |= {"memory": memory, "memory_layout": Layout(None, memory.shape[1], kept)}
    if padding is not None:
        return stack(padding.pack(rows), padding.layout, **how), padding.pad
    tokens = None if mask is None else mask.bool()
    keep = torch.ones(shape, dtype=torch.bool, device=rows.device) if tokens is None else tokens
    return stack(rows, Layout(None, shape[1], tokens), **how), lambda x: x * keep[..., None].to(x.dtype)


def _items(labels: Tensor, items: Tensor | int | None) -> Tensor | int:
    return (labels != -100).sum().clamp(min=1) if items is None else items
