"""The encoder: as the first half of a model, and alone."""

import copy
from typing import Any, ClassVar

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from fat5.model.configuration import COUNTED_FROM_THE_FIRST_TOKEN
from fat5.model.layers import Embedding
from fat5.model.layout import Layout
from fat5.model.pretrained import FAT5PreTrainedModel
from fat5.model.rows import Trace, run_rows
from fat5.model.stack import Stack

# Weights of a seq2seq checkpoint, or of a head, that an encoder does not need.
NOT_OF_AN_ENCODER = [
    r"^(transformer\.)?decoder\.", r"^lm_head\.", r"^classifier\.", r"^classification_head\.", r"^qa_outputs\.",
]  # fmt: skip


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
        layout: Layout | None = None,
        *,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Packed with `layout`: hidden states (T, d). On rows: a BaseModelOutput with (B, L, d); states at padding are
        zeros unless the encoder `computes_padding`.
        """
        rows = input_ids if inputs_embeds is None else inputs_embeds
        if rows is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")
        if layout is not None:
            return super().forward(rows, layout)
        trace = Trace.of(output_hidden_states, output_attentions)
        hidden, back = run_rows(
            super().forward, rows, attention_mask, whole=self.computes_padding, causal=False, trace=trace
        )
        states, attentions, _ = trace.kept()
        output = BaseModelOutput(last_hidden_state=back(hidden), hidden_states=states, attentions=attentions)
        return output.to_tuple() if return_dict is False else output


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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Any:
        """Hidden states of every token: rows (B, L, d), with padding as in transformers (`config.compute_padding`);
        packed (T, d).

        Packed: input_ids (T,) or inputs_embeds (T, d), cu_seqlens int32 (N+1,), max_seqlen an int that bounds the
        documents' lengths.

        Raises:
            ValueError: an argument that the layout needs is missing, or one that it cannot serve is given.
        """
        self.refuse_unread_embeddings()
        output = encode(
            self.encoder, input_ids, attention_mask, inputs_embeds, output_attentions, output_hidden_states,
            cu_seqlens, max_seqlen,
        )  # fmt: skip
        return output if self.wants_dict(return_dict) else output.to_tuple()


def encode(
    encoder: Encoder,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> BaseModelOutput:
    """Padded rows or packed documents through an encoder; see `FAT5EncoderModel.forward`."""
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("cu_seqlens: packed documents need it beside max_seqlen, got None")
        config = encoder.config
        return encoder(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            output_attentions=config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=(
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
        )  # fmt: skip
    if max_seqlen is None:
        raise ValueError("max_seqlen: packed documents need it beside cu_seqlens, got None")
    refused = dict(
        attention_mask=attention_mask is not None,
        output_attentions=output_attentions,
        output_hidden_states=output_hidden_states,
    )
    for name, given in refused.items():
        if given:
            raise ValueError(f"{name}: packed documents (cu_seqlens) take none; give padded rows")
    return BaseModelOutput(
        last_hidden_state=encoder(input_ids, Layout(cu_seqlens, max_seqlen), inputs_embeds=inputs_embeds)
    )
