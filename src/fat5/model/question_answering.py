"""Extractive question answering: where the answer begins and ends in the text."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import QuestionAnsweringModelOutput, Seq2SeqQuestionAnsweringModelOutput

from fat5.errors import ConfigurationError
from fat5.model.encoder import NOT_OF_AN_ENCODER, FAT5EncoderModel, encode
from fat5.model.encoder_decoder import NOT_WITHOUT_A_HEAD, EncoderDecoder
from fat5.model.heads import refuse_given
from fat5.model.layers import HeadProjection


class FAT5ForQuestionAnswering(EncoderDecoder):
    """Start and end of the answer in the text.

    By default (`head_form` None or "encoder-decoder") as transformers' T5ForQuestionAnswering, whose decoder reads the
    text too; with head_form "encoder" from the encoder alone, which costs half and also reads packed documents.
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

    def forward(
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Any:
        """start_logits and end_logits, (B, L) each, or (T,) packed, which takes no positions of answers.

        The loss is the mean of the two cross-entropies; positions outside the text do not count.

        Raises:
            ValueError: an argument that this form cannot serve.
        """
        run: Any
        if self.has_decoder:
            refuse_given("a decoder", cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                if input_ids is None:
                    raise ValueError("decoder_input_ids: without input_ids they must be given, got None")
                decoder_input_ids = self._shift_right(input_ids)
            if start_positions is not None and end_positions is not None:
                use_cache = False
            elif use_cache is None:
                use_cache = self.config.use_cache and not self.training
            run = self.run(
                input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, None,
                inputs_embeds, decoder_inputs_embeds, use_cache, output_attentions, output_hidden_states,
            )  # fmt: skip
        else:
            refuse_given(
                "no decoder", decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask,
                encoder_outputs=encoder_outputs, decoder_inputs_embeds=decoder_inputs_embeds,
                use_cache=use_cache or None,
            )  # fmt: skip
            self.refuse_unread_embeddings()
            run = encode(
                self.encoder, input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states,
                cu_seqlens, max_seqlen,
            )  # fmt: skip
        start, end = self.qa_outputs(run.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            if cu_seqlens is not None:
                raise ValueError("start_positions: packed documents (cu_seqlens) take none; give padded rows")
            loss = (_position_loss(start, start_positions) + _position_loss(end, end_positions)) / 2
        if self.has_decoder:
            named = {key: value for key, value in run.items() if key != "last_hidden_state"}
            output: Any = Seq2SeqQuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **named)
        else:
            output = QuestionAnsweringModelOutput(
                loss=loss,
                start_logits=start,
                end_logits=end,
                hidden_states=run.hidden_states,
                attentions=run.attentions,
            )
        return output if self.wants_dict(return_dict) else output.to_tuple()


def _position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Cross-entropy over the places of a text (B, L); an answer that was cut off lies outside and does not count."""
    length = logits.shape[1]
    if positions.dim() > 1:
        positions = positions.squeeze(-1)
    return F.cross_entropy(logits, positions.to(logits.device).clamp(0, length), ignore_index=length)
