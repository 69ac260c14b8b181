"""Heads that classify a text or each of its tokens, or find an answer in it.

Each reads padded rows as the stock class of its name, or packed documents (`cu_seqlens`), with the same numbers. Each
loads from a seq2seq checkpoint; an encoder leaves the decoder and the output projection aside.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForQuestionAnsweringLoss
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    Seq2SeqQuestionAnsweringModelOutput,
    Seq2SeqSequenceClassifierOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from fat5.errors import ConfigurationError, DataError
from fat5.model.layers import HeadProjection
from fat5.model.padding import segment_numbers
from fat5.model.pretrained import FAT5PreTrainedModel, refuse_given
from fat5.model.t5 import NOT_OF_AN_ENCODER, NOT_WITHOUT_A_HEAD, EncoderDecoder, FAT5EncoderModel, FAT5Model
from fat5.ops import Dropout, is_recorded

FORM = "a head with head_form {!r} takes none"


class ClassificationHead(nn.Module):
    """out_proj(tanh(dense(x))) with dropout before each."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = HeadProjection(config.d_model, config.d_model)
        self.dropout = Dropout(config.classifier_dropout)
        self.out_proj = HeadProjection(config.d_model, config.num_labels)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(hidden)))))


class FAT5ForSequenceClassification(FAT5PreTrainedModel):
    """A label, or a number, for each text, read from one vector by `head_form`:

    - None or "encoder": the mean of the encoder's hidden states over the text's tokens;
    - "encoder-eos": the encoder's hidden state at the text's last EOS, as in the first FAT5;
    - "encoder-decoder": the decoder, which reads the text too, at the text's last EOS, as stock
      T5ForSequenceClassification.

    A packed document ends with its EOS. An empty one counts as a vector of zeros.
    """

    # These losses are not divided by num_items_in_batch, as Trainer would otherwise assume.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected: ClassVar = NOT_WITHOUT_A_HEAD
    _head_weights: ClassVar = ("classification_head.",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.has_decoder = config.head_form == "encoder-decoder"
        self.num_labels = config.num_labels
        self.transformer = FAT5Model(config) if self.has_decoder else FAT5EncoderModel(config)
        self.classification_head = ClassificationHead(config)
        if not self.has_decoder:
            self._keys_to_ignore_on_load_unexpected = NOT_OF_AN_ENCODER  # type: ignore[misc]
            self.transformer.get_encoder().padding_is_read = False  # the mean is over tokens
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        return_dict: bool | None = None,
        **asked: Any,
    ) -> Any:
        """logits (B, num_labels), or (N, num_labels) for N packed documents; the loss follows `problem_type`, as in
        transformers.

        Raises:
            ValueError: an argument that this form does not take.
            DataError: the form reads at EOS, and the rows differ in their number of EOS tokens or have none, or a
                packed document does not end with EOS.
        """
        form = self.config.head_form or "encoder"
        packed: dict[str, Any] = dict(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        if form != "encoder" and input_ids is None:
            raise ValueError(f"input_ids: head_form {form!r} finds EOS in them, got None")
        if self.has_decoder:
            packed = _read_twice(
                cu_seqlens, max_seqlen, decoder_input_ids=decoder_input_ids, decoder_inputs_embeds=decoder_inputs_embeds
            )
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self._shift_right(input_ids, cu_seqlens)  # type: ignore[arg-type]
            run = self.transformer(
                input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs,
                inputs_embeds=inputs_embeds, decoder_inputs_embeds=decoder_inputs_embeds,
                use_cache=use_cache if labels is None else False, **packed, return_dict=True, **asked,
            )  # fmt: skip
        else:
            refuse_given(
                FORM.format(form), decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs, decoder_inputs_embeds=decoder_inputs_embeds,
                use_cache=use_cache or None,
            )  # fmt: skip
            run = self.transformer(input_ids, attention_mask, inputs_embeds, **packed, return_dict=True, **asked)
        if form == "encoder":
            pooled = _mean_of_tokens(run.last_hidden_state, attention_mask, cu_seqlens)
        elif cu_seqlens is not None:
            pooled = self._at_the_ends(run.last_hidden_state, input_ids, cu_seqlens)  # type: ignore[arg-type]
        else:
            pooled = self._at_last_eos(run.last_hidden_state, input_ids)  # type: ignore[arg-type]
        logits = self.classification_head(pooled)
        loss = None if labels is None else _classification_loss(logits, labels, self.config)
        kind = Seq2SeqSequenceClassifierOutput if self.has_decoder else SequenceClassifierOutput
        return self.returned(kind(loss=loss, logits=logits, **_beside_states(run)), return_dict)

    def _at_last_eos(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        is_eos = input_ids == self.config.eos_token_id
        counts = is_eos.sum(dim=1)
        if not is_recorded() and (bool((counts != counts[0]).any()) or int(counts[0]) == 0):
            raise DataError(
                "the texts differ in their number of EOS tokens, or have none",
                where="input_ids",
                hint="end each text with one EOS token; its hidden state is read there",
            )
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(is_eos, place, -1).amax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def _at_the_ends(self, hidden: Tensor, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(T, d) packed to (N, d), the states at each document's last token."""
        last, is_empty = (cu_seqlens[1:] - 1).clamp(min=0).long(), cu_seqlens.diff() == 0
        if not (is_recorded() or torch.compiler.is_compiling()):
            missing = ((input_ids[last] != self.config.eos_token_id) & ~is_empty).nonzero()
            if len(missing):
                raise DataError(
                    f"document {int(missing[0, 0])} does not end with EOS",
                    where="input_ids",
                    hint="end each document with one EOS token; its hidden state is read there",
                )
        return hidden.index_select(0, last).masked_fill(is_empty[:, None], 0)


class FAT5ForTokenClassification(FAT5PreTrainedModel):
    """A label for each token, from the encoder, as transformers' T5ForTokenClassification."""

    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected: ClassVar = NOT_OF_AN_ENCODER
    _head_weights: ClassVar = ("classifier.",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = FAT5EncoderModel(config)
        self.dropout = Dropout(config.classifier_dropout)
        self.classifier = HeadProjection(config.d_model, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        return_dict: bool | None = None,
        **asked: Any,
    ) -> Any:
        """logits (B, L, num_labels), or (T, num_labels) packed; labels of -100 do not count."""
        run = self.transformer(
            input_ids, attention_mask, inputs_embeds, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, return_dict=True,
            **asked,
        )  # fmt: skip
        logits = self.classifier(self.dropout(run.last_hidden_state))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.reshape(-1, self.num_labels), labels.to(logits.device).reshape(-1))
        return self.returned(TokenClassifierOutput(loss=loss, logits=logits, **_beside_states(run)), return_dict)


class FAT5ForQuestionAnswering(EncoderDecoder):
    """Start and end of the answer in the text.

    With head_form None or "encoder-decoder" as transformers' T5ForQuestionAnswering, whose decoder reads the text too;
    with "encoder" from the encoder alone, which costs half.
    """

    accepts_loss_kwargs = False
    _head_weights: ClassVar = ("qa_outputs.",)
    _keys_to_ignore_on_load_unexpected: ClassVar = NOT_WITHOUT_A_HEAD

    def __init__(self, config: Any) -> None:
        if config.head_form == "encoder-eos":
            raise ConfigurationError(
                "encoder-eos is a form of sequence classification", where="head_form", hint="Use encoder"
            )
        super().__init__(config, has_decoder=config.head_form != "encoder")
        self.has_decoder = config.head_form != "encoder"
        if not self.has_decoder:
            self._keys_to_ignore_on_load_unexpected = NOT_OF_AN_ENCODER  # type: ignore[misc]
            self._tied_weights_keys = FAT5EncoderModel._tied_weights_keys  # type: ignore[misc]
        self.num_labels = config.num_labels
        self.qa_outputs = HeadProjection(config.d_model, config.num_labels)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        return_dict: bool | None = None,
        **asked: Any,
    ) -> Any:
        """start_logits and end_logits, (B, L) each, or (T,) packed, which takes no start_positions.

        The loss is the mean of the two cross-entropies; positions outside the text do not count.

        Raises:
            ValueError: an argument that this form does not take.
        """
        run: Any
        if self.has_decoder:
            packed = _read_twice(
                cu_seqlens, max_seqlen, decoder_input_ids=decoder_input_ids, decoder_inputs_embeds=decoder_inputs_embeds
            )
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                if input_ids is None:
                    raise ValueError("decoder_input_ids: without input_ids they must be given, got None")
                decoder_input_ids = self._shift_right(input_ids, cu_seqlens)
            if start_positions is not None and end_positions is not None:
                use_cache = False
            run = super().forward(
                input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, None,
                inputs_embeds, decoder_inputs_embeds, use_cache, **packed, return_dict=True, **asked,
            )  # fmt: skip
        else:
            refuse_given(
                "a head without a decoder takes none", decoder_input_ids=decoder_input_ids,
                decoder_attention_mask=decoder_attention_mask, encoder_outputs=encoder_outputs,
                decoder_inputs_embeds=decoder_inputs_embeds, use_cache=use_cache or None,
            )  # fmt: skip
            run = self.encode(input_ids, attention_mask, inputs_embeds, cu_seqlens, max_seqlen, **asked)
        start, end = self.qa_outputs(run.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            if cu_seqlens is not None:
                raise ValueError("start_positions: packed documents (cu_seqlens) take none; give padded rows")
            positions = start_positions.to(start.device), end_positions.to(end.device)
            loss = ForQuestionAnsweringLoss(start, end, *positions)
        kind: Any = Seq2SeqQuestionAnsweringModelOutput if self.has_decoder else QuestionAnsweringModelOutput
        output = kind(loss=loss, start_logits=start, end_logits=end, **_beside_states(run))
        return self.returned(output, return_dict)


def _read_twice(cu_seqlens: Tensor | None, max_seqlen: int | None, **decoder_inputs: Any) -> dict[str, Any]:
    """Where the documents begin, for an encoder and a decoder that read the same text."""
    if cu_seqlens is None:
        return {"max_seqlen": max_seqlen}
    refuse_given("packed documents (cu_seqlens) are the decoder's inputs too and take none", **decoder_inputs)
    return {
        "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen,
        "decoder_cu_seqlens": cu_seqlens, "decoder_max_seqlen": max_seqlen,
    }  # fmt: skip


def _beside_states(run: Any) -> dict[str, Any]:
    """The fields of an output but its last hidden state."""
    return {key: value for key, value in run.items() if key != "last_hidden_state"}


def _mean_of_tokens(hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """(B, L, d) with a mask, or (T, d) packed, to the mean over each text's tokens, summed in float32."""
    if cu_seqlens is None:
        kept = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask.bool().float()
        total, count = (hidden.float() * kept[..., None]).sum(dim=1), kept.sum(dim=1)
    else:
        numbers = segment_numbers(cu_seqlens, len(hidden))
        documents = torch.arange(len(cu_seqlens) - 1, device=numbers.device)
        # A product with zeros and ones: a GPU's index_add sums in another order every time.
        with torch.autocast(hidden.device.type, enabled=False):
            is_of = (numbers == documents[:, None]).float()
            in_one = (numbers < len(documents))[:, None]
            total = is_of @ hidden.float().where(in_one, 0.0)  # zeros behind the last document: 0 * nan is nan
        count = cu_seqlens.diff().float()
    return (total / count.clamp(min=1)[:, None]).to(hidden.dtype)


def _classification_loss(logits: Tensor, labels: Tensor, config: Any) -> Tensor:
    """The loss of `problem_type`. If None: regression for one output, single-label for integer labels, else
    multi-label.
    """
    labels = labels.to(logits.device)
    kind = config.problem_type
    if kind is None:
        whole = labels.dtype in (torch.long, torch.int)
        several = "single_label_classification" if whole else "multi_label_classification"
        kind = "regression" if config.num_labels == 1 else several
    if kind == "regression":
        return F.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
    if kind == "single_label_classification":
        return F.cross_entropy(logits.reshape(-1, config.num_labels), labels.reshape(-1))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
