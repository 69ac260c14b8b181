"""The encoder with its decoder, on padded rows as transformers' callers give them."""

from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqModelOutput
from transformers.utils import ModelOutput

from fat5.model.decoder import Decoder
from fat5.model.encoder import Encoder
from fat5.model.layers import Embedding
from fat5.model.pretrained import FAT5PreTrainedModel


class EncoderDecoder(FAT5PreTrainedModel):
    """Shared embeddings, encoder and decoder: what every model with a decoder is built on."""

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

    def run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
        encoder_outputs: Any,
        past_key_values: Any,
        inputs_embeds: Tensor | None,
        decoder_inputs_embeds: Tensor | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> Seq2SeqModelOutput:
        """Encoder, unless its outputs are given, then decoder; last_hidden_state (B, U, d) is the decoder's."""
        self.refuse_unread_embeddings()
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
                output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            )  # fmt: skip
        elif not isinstance(encoder_outputs, BaseModelOutput):
            parts = encoder_outputs.to_tuple() if isinstance(encoder_outputs, ModelOutput) else encoder_outputs
            encoder_outputs = BaseModelOutput(*parts[:3])
        memory = encoder_outputs.last_hidden_state
        decoded = self.decoder(
            decoder_input_ids, inputs_embeds=decoder_inputs_embeds, attention_mask=decoder_attention_mask,
            encoder_hidden_states=memory, encoder_attention_mask=attention_mask,
            past_key_values=past_key_values, use_cache=bool(use_cache),
            output_attentions=output_attentions, output_hidden_states=output_hidden_states,
        )  # fmt: skip
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """(B, U) labels to decoder inputs, shifted right."""
        return self._shift_right(labels)


# Weights of a seq2seq checkpoint that what has a decoder but no language-model head does not need.
NOT_WITHOUT_A_HEAD = [*(EncoderDecoder._keys_to_ignore_on_load_unexpected or []), r"^lm_head\."]


class FAT5Model(EncoderDecoder):
    """The encoder-decoder without a head, as transformers' T5Model."""

    _keys_to_ignore_on_load_unexpected: ClassVar = NOT_WITHOUT_A_HEAD

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.post_init()

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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Padded rows as in transformers' T5Model; last_hidden_state is the decoder's (B, U, d)."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        outputs = self.run(
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs, past_key_values,
            inputs_embeds, decoder_inputs_embeds, use_cache, output_attentions, output_hidden_states,
        )  # fmt: skip
        return outputs if self.wants_dict(return_dict) else outputs.to_tuple()
