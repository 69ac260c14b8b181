"""FAT5ForConditionalGeneration: T5's encoder-decoder with its language-model head, packed inside."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, MT5ForConditionalGeneration, UMT5ForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput

from fat5 import ops
from fat5.model.pretrained import refuse_given
from fat5.model.t5 import EncoderDecoder


@dataclass
class PackedLMOutput(ModelOutput):
    """The loss of packed training, z-loss and label smoothing included. With per_token=True also each label's plain
    negative log-likelihood, (U,) float32, 0 where ignored, and whether it had the highest logit, (U,) bool.
    """

    loss: Tensor | None = None
    token_loss: Tensor | None = None
    token_correct: Tensor | None = None


class FAT5ForConditionalGeneration(EncoderDecoder, GenerationMixin):
    """T5 with a language-model head.

    Forward takes padded rows, with the signature and outputs of transformers' T5ForConditionalGeneration, or packed
    documents (`cu_seqlens`) for training. Parameters have that class's names and shapes.
    """

    _tied_weights_keys: ClassVar = EncoderDecoder._tied_weights_keys | {"lm_head.weight": "shared.weight"}
    # Trainer may pass `num_items_in_batch`.
    accepts_loss_kwargs = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Also unties the output projection if the tensors hold one that differs from the embeddings; stock
        configurations say "tied" of every T5.
        """
        table, head = (state_dict.get(f"{name}.weight") for name in ("shared", "lm_head"))
        tied = self.lm_head.weight is self.shared.weight
        if tied and table is not None and head is not None and not torch.equal(head, table):
            self.lm_head.weight = nn.Parameter(torch.empty_like(self.lm_head.weight))
            self.config.tie_word_embeddings = False
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def forward(  # type: ignore[override]
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
        return_dict: bool | None = None,
        **asked: Any,
    ) -> Any:
        """Padded rows as in transformers' T5, or packed documents.

        Packed (`cu_seqlens` given): input_ids (T,) and labels (U,) int64, cu_seqlens and decoder_cu_seqlens int32
        (N+1,), max_seqlen and decoder_max_seqlen ints that bound the documents' lengths. Decoder inputs are the labels
        shifted right inside each document; labels of -100 do not count. Returns a `PackedLMOutput` without logits.

        The loss is the sum over the labels that count, divided by `num_items_in_batch`, or by their number.
        `asked` may hold output_hidden_states and output_attentions, which needs quadratic memory.

        Raises:
            ValueError: an argument is missing, or one is given that packed training does not take.
        """
        if cu_seqlens is not None:
            asked = {name: value or None for name, value in asked.items()}
            packed = dict(
                input_ids=input_ids, labels=labels, max_seqlen=max_seqlen,
                decoder_cu_seqlens=decoder_cu_seqlens, decoder_max_seqlen=decoder_max_seqlen,
            )  # fmt: skip
            for name, value in packed.items():
                if value is None:
                    raise ValueError(f"{name}: packed training needs it beside cu_seqlens, got None")
            refuse_given(
                "packed training (cu_seqlens) takes none; give padded rows", attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs, past_key_values=past_key_values, inputs_embeds=inputs_embeds,
                decoder_inputs_embeds=decoder_inputs_embeds, **asked,
            )  # fmt: skip
            read = super().forward(
                input_ids, decoder_input_ids=self._shift_right(labels, decoder_cu_seqlens),  # type: ignore[arg-type]
                cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, decoder_cu_seqlens=decoder_cu_seqlens,
                decoder_max_seqlen=decoder_max_seqlen, return_dict=True,
            )  # fmt: skip
            return self._packed_loss(read.last_hidden_state, labels, num_items_in_batch, per_token)  # type: ignore[arg-type]
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = super().forward(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache, return_dict=True, **asked,
        )  # fmt: skip
        logits = self.lm_head(self._scaled(outputs.last_hidden_state))
        loss = None if labels is None else self._loss_of_logits(logits, labels, num_items_in_batch)
        named = {key: value for key, value in outputs.items() if key != "last_hidden_state"}
        return self.returned(Seq2SeqLMOutput(loss=loss, logits=logits, **named), return_dict)

    def _packed_loss(
        self, hidden: Tensor, labels: Tensor, items: Tensor | int | None, per_token: bool
    ) -> PackedLMOutput:
        hidden = self._scaled(hidden)
        if not ops.is_plain(self.lm_head, nn.Linear) or self.lm_head.bias is not None:
            # An adapted or quantised head: all logits are made.
            logits = self.lm_head(hidden)
            output = PackedLMOutput(loss=self._loss_of_logits(logits, labels, items))
            if per_token:
                output["token_loss"] = F.cross_entropy(logits.float(), labels, reduction="none")
                output["token_correct"] = logits.argmax(dim=-1) == labels
            return output
        total = ops.linear_cross_entropy(
            hidden, self.lm_head.weight, labels, reduction="sum",
            z_loss=float(self.config.z_loss), label_smoothing=float(self.config.label_smoothing),
        )  # fmt: skip
        output = PackedLMOutput(loss=total / _items(labels, items))
        if per_token:
            output["token_loss"], output["token_correct"] = ops.token_statistics(hidden, self.lm_head.weight, labels)
        return output

    def _scaled(self, hidden: Tensor) -> Tensor:
        """Scales the decoder's output as T5 v1.0 does, whose output projection is tied; v1.1 does not."""
        return hidden * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else hidden

    def _loss_of_logits(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        flat, targets = logits.flatten(0, -2).float(), labels.to(logits.device).flatten()
        smoothing = float(self.config.label_smoothing)
        total = F.cross_entropy(flat, targets, label_smoothing=smoothing, reduction="sum")
        if self.config.z_loss > 0.0:
            total = total + self.config.z_loss * (torch.logsumexp(flat, dim=-1).square() * (targets != -100)).sum()
        return total / _items(targets, items)


def _items(labels: Tensor, items: Tensor | int | None) -> Tensor | int:
    return (labels != -100).sum().clamp(min=1) if items is None else items


def scales_output(model: Any) -> bool:
    """Whether a T5 of any family divides hidden states by the root of their width before the output projection."""
    if isinstance(model, MT5ForConditionalGeneration):
        return False
    if isinstance(model, UMT5ForConditionalGeneration):
        return bool(model.config.tie_word_embeddings)
    return bool(model.config.scale_decoder_outputs)
