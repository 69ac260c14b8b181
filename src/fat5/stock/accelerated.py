"""`fat5.accelerate`: a stock T5, mT5 or umT5 of transformers made fast in place, by giving its modules other classes.

Parameters, module names, hooks and configuration stay as they are: only `__class__` changes, to a subclass of the stock
class. A stack removes padding that nobody reads on entry and restores it on exit; in between, stock blocks run on
packed tokens (1, T, d) and pass the packing (`packed=`) to attention. A stack calls the stock class for inputs that it
cannot pack: one-token steps of decoding, `output_attentions`, masks of four dimensions, masks that leave a query
without a key, tracing.
"""

from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions, Seq2SeqLMOutput
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5
from transformers.models.umt5 import modeling_umt5
from transformers.utils import output_capturing

from fat5 import ops
from fat5.errors import UnsupportedModelError
from fat5.model.layers import gated, learned_bias
from fat5.model.padding import Padding
from fat5.model.seq2seq import scales_output
from fat5.ops import RelativeBias
from fat5.stock.recordings import Recordings, check_device


def accelerate(
    model: Any,
    *,
    undo: bool = False,
    fused_loss: bool = False,
    compute_padding: bool | None = None,
    cuda_graphs: bool = False,
) -> Any:
    """Makes every stock T5, mT5 or umT5 in `model` fast, in place; same tokens, losses and gradients, up to rounding.

    Args:
        model: a T5, mT5 or umT5 of transformers (encoder-decoder, encoder, or with a head), or a module that contains
            one, such as a PEFT model.
        undo: restore the stock classes.
        fused_loss: in training, compute the loss of a language-model head without logits, which are then None, and
            only for the labels that count.
        compute_padding: True computes an encoder's hidden states at padding, as stock T5 does; False skips them, which
            is faster, and returns zeros. None skips them only if a decoder follows, since it does not read them.
        cuda_graphs: on a GPU, in evaluation mode and without gradients, record an encoder's kernels once a shape (from
            its second call on, up to 16 shapes) and replay them: one short prompt is otherwise a matter of launches.
            The outputs are the caller's own, and weights may change in place.

    Raises:
        UnsupportedModelError: there is no such model in `model`, or one whose modules had their `forward` replaced;
            cuda_graphs without a GPU.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    if {STOCK.get(type(module), type(module)) for module in modules}.isdisjoint(STACKS):
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no T5, mT5 or umT5 of transformers",
            where="fat5.accelerate",
            hint="FAT5's own models are fast as they are; T5's variants (LongT5, Switch, UDOP) are not served",
        )
    if undo:
        for module in modules:
            module.__class__ = STOCK.get(type(module), type(module))
            for name in ("computes_padding", "recordings"):
                vars(module).pop(name, None)
        return model
    if cuda_graphs:
        check_device()
    for module in modules:
        if type(module) in FAST and "forward" in vars(module):
            raise UnsupportedModelError(
                f"the forward of a {type(module).__name__} was replaced, by device_map's hooks for instance",
                where="fat5.accelerate",
                hint="Accelerate the model before it is hooked or offloaded",
            )
    followed = [module.encoder for module in modules if hasattr(module, "encoder") and hasattr(module, "decoder")]
    for module in modules:
        # Each call chooses fused_loss, compute_padding and cuda_graphs anew.
        stock = STOCK.get(type(module), type(module)) if type(module) in FUSED.values() else type(module)
        module.__class__ = FUSED[stock] if fused_loss and stock in FUSED else FAST.get(stock, stock)
        if isinstance(module, _Stack):
            read = all(module is not encoder for encoder in followed)
            module.computes_padding = read if compute_padding is None else compute_padding
            module.recordings = Recordings() if cuda_graphs and not module.is_decoder else None
    return model


@dataclass
class Packing:
    """How a stack's own tokens and the memory's are packed, and the bias that its blocks share.

    Args:
        first: the first block's self-attention, whose bucket table serves the blocks without one.
        bias: made from that table; None if each block makes its own.
    """

    own: Padding
    memory: Padding | None
    first: Any
    bias: RelativeBias | None


class _Stack:
    computes_padding: bool
    recordings: Recordings | None

    def forward(  # type: ignore[no-untyped-def]
        self: Any,
        input_ids=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        inputs_embeds=None,
        past_key_values=None,
        use_cache=None,
        **kwargs,
    ):
        """As the stock stack's; `padding`, of the fused loss, says which tokens are computed."""
        padding = kwargs.pop("padding", None)
        rows: Any = input_ids if inputs_embeds is None else inputs_embeds
        memory: Any = encoder_hidden_states if self.is_decoder else None
        masks = [(attention_mask, rows), (encoder_attention_mask, memory)]
        own, across = None, None
        if self._serves(input_ids, inputs_embeds, memory, masks, past_key_values, use_cache, kwargs):
            own, across = self._paddings(masks, padding)
        if own is None or own.segments.formed or (across is not None and across.segments.formed):
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask, inputs_embeds=inputs_embeds,
                past_key_values=past_key_values, use_cache=use_cache, **kwargs,
            )  # fmt: skip
        if not self.is_decoder:
            past_key_values = None
        elif past_key_values is None and _wants_cache(self, use_cache):
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        asked = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        tokens = own.pack(rows)
        states: list[Tensor] | None = [] if asked else None
        run = partial(self._run, memory=memory, across=across, past_key_values=past_key_values, states=states)
        last = None
        if self.recordings is not None and not (asked or torch.compiler.is_compiling()):
            last = self.recordings(self, tokens, own, run)
        last = own.restore(run(tokens, own) if last is None else last)
        output = BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=(*states, last) if asked else None,  # type: ignore[misc]
        )
        return output.to_tuple() if kwargs.get("return_dict", self.config.return_dict) is False else output

    def _run(  # type: ignore[no-untyped-def]
        self: Any, tokens: Tensor, own: Padding, *, memory, across, past_key_values, states: list[Tensor] | None
    ) -> Tensor:
        """The states (T, d) of packed ids or embeddings; those before each block, as rows, go to `states`."""
        hidden = (tokens if tokens.is_floating_point() else self.embed_tokens(tokens[None])[0])[None]
        packed_memory = None if across is None else across.pack(memory)[None]
        first = self.block[0].layer[0].SelfAttention
        # Under gradient checkpointing each block makes the bias: a shared tensor would be outside its recomputation.
        apart = self.training and getattr(self.block[0], "gradient_checkpointing", False)
        packing = Packing(own, across, first, None if apart else _bias(first, hidden.device))
        between = () if isinstance(self, modeling_umt5.UMT5Stack) else (None,)
        hidden = self.dropout(hidden)
        for block in self.block:
            if states is not None:
                states.append(own.restore(hidden[0]))
                hidden = own.pack(states[-1])[None]  # so that the gradient of what is returned can be read
            out = block(hidden, None, *between, packed_memory, packed=packing, past_key_values=past_key_values)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.dropout(self.final_layer_norm(hidden))[0]  # type: ignore[no-any-return]

    def _serves(  # type: ignore[no-untyped-def]
        self: Any, input_ids, inputs_embeds, memory, masks, cache, use_cache, kwargs
    ) -> bool:
        if (input_ids is None) == (inputs_embeds is None) or ops.is_recorded():
            return False
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            return False
        if kwargs.get("output_hidden_states", None) not in (True, False, None):  # layers of choice
            return False
        if kwargs.get("is_causal", getattr(self.config, "is_causal", None)) is not None:
            return False
        rows = masks[0][1]
        if any(mask is not None and (x is None or mask.shape != x.shape[:2]) for mask, x in masks):
            return False
        if not self.is_decoder:
            return not use_cache
        if memory is not None and len(memory) != len(rows):
            return False
        if cache is None:
            return self.config.is_encoder_decoder or not _wants_cache(self, use_cache)
        # The stock class runs decoding steps, and everything else behind a filled cache.
        return isinstance(cache, EncoderDecoderCache) and rows.shape[1] > 1 and int(cache.get_seq_length()) == 0

    def _paddings(self: Any, masks: Any, own: Padding | None) -> tuple[Padding, Padding | None]:  # type: ignore[misc]
        """Paddings of the stack's own tokens and of the memory."""
        (mask, rows), (memory_mask, memory) = masks
        device, decodes = rows.device, self.is_decoder
        if own is None:
            whole = decodes or self.computes_padding
            own = Padding.of(mask, tuple(rows.shape[:2]), device, whole=whole, causal=decodes)
        across = None if memory is None else Padding.of(memory_mask, tuple(memory.shape[:2]), device, whole=False)
        return own, across


class _Attention:
    def forward(self: Any, hidden_states, *args, packed: Packing | None = None, **kwargs):  # type: ignore[no-untyped-def]
        """As the stock attention's; with `packed`, over packed tokens (1, T, d)."""
        if packed is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        memory = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
        queries, keys = packed.own, packed.own if memory is None else packed.memory
        assert keys is not None
        source = hidden_states if memory is None else memory
        query, key, value = (
            ops.linear(layer, x)[0].unflatten(-1, (self.n_heads, self.key_value_proj_dim))
            for layer, x in ((self.q, hidden_states), (self.k, source), (self.v, source))
        )
        if kwargs.get("past_key_values") is not None:
            _keep(kwargs["past_key_values"], self.layer_idx, keys, key, value, memory is not None)
        bias = None
        if memory is None:
            holder = self if self.has_relative_attention_bias else packed.first
            shared = packed.bias if holder is packed.first else None
            bias = _bias(holder, query.device) if shared is None else shared
        out = ops.linear(self.o, _attend(self, queries, keys, query, key, value, bias).flatten(-2)[None])
        return (out, None) if isinstance(self, modeling_umt5.UMT5Attention) else (out, None, None)


class _LayerNorm:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """In one pass if the dtypes agree; otherwise as the stock class."""
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class _GatedFeedForward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """wo(gelu(wi_0 x) * wi_1 x), GELU and gate in one."""
        if not isinstance(self.act, NewGELUActivation):
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        hidden = self.dropout(gated(self.wi_0, self.wi_1, hidden_states))
        # float16 models keep wo in float32: what goes into it may be beyond float16.
        weight = getattr(self.wo, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            hidden = hidden.to(weight.dtype)
        return ops.linear(self.wo, hidden)


def _attend(
    module: Any, queries: Padding, keys: Padding, query: Tensor, key: Tensor, value: Tensor, bias: RelativeBias | None
) -> Tensor:
    """query (Tq, H, D), key, value (Tk, H, D) to (Tq, H, D)."""
    how: dict[str, Any] = {
        "bias": bias, "causal": module.is_causal, "scale": module.scaling,
        "dropout_p": module.dropout if module.training else 0.0,
    }  # fmt: skip
    if keys.segments.mask is None:
        return ops.attention(
            query, key, value, **how,
            cu_seqlens_q=queries.segments.cu_seqlens, max_seqlen_q=queries.segments.max_seqlen,
            cu_seqlens_k=keys.segments.cu_seqlens, max_seqlen_k=keys.segments.max_seqlen,
            shared=None if torch.compiler.is_compiling() else queries.segments.shared,
        )  # fmt: skip
    # Whole rows with hidden keys stay in rows, and so must the queries.
    rows = (side.pad(x).transpose(1, 2) for side, x in ((queries, query), (keys, key), (keys, value)))
    return queries.pack(ops.attention(*rows, **how, key_padding_mask=keys.segments.mask).transpose(1, 2))


def _bias(attention: Any, device: torch.device) -> RelativeBias:
    reach = attention.relative_attention_max_distance
    return learned_bias(attention, device, bidirectional=not attention.is_decoder, max_distance=reach)


def _keep(cache: Any, layer: int, keys: Padding, key: Tensor, value: Tensor, crosses: bool) -> None:
    """Fills the cache for decoding steps; at padding with zeros, which the mask hides."""
    side = cache.cross_attention_cache if crosses else cache.self_attention_cache
    side.update(keys.pad(key).transpose(1, 2), keys.pad(value).transpose(1, 2), layer)
    if crosses:
        cache.is_updated[layer] = True


def _wants_cache(stack: Any, use_cache: bool | None) -> bool:
    """Whether to make a cache; in training only on request, since nobody reads it."""
    return bool(stack.config.use_cache and not stack.training) if use_cache is None else use_cache


def _with_fused_loss(stock: Any) -> Any:
    names = list(signature(stock.forward).parameters)[1:]

    @wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args)) | kwargs
        labels, mask, inputs, head = (
            given.get("labels"), given.get("decoder_attention_mask"), given.get("decoder_inputs_embeds"), self.lm_head
        )  # fmt: skip
        usable = labels is not None and mask is None and inputs is None and given.get("past_key_values") is None
        asks = any(given.get(name) for name in ("output_attentions", "output_hidden_states", "use_cache"))
        if not (self.training and usable) or asks or not ops.is_plain(head, nn.Linear) or head.bias is not None:
            return stock.forward(self, *args, **kwargs)
        return _loss_alone(self, given)

    return {"forward": forward, "__doc__": f"{stock.__name__} whose training makes no logits."}


def _loss_alone(model: Any, given: dict[str, Any]) -> Any:
    """The loss over labels that are not -100; only if compiled, tokens behind the last such label are decoded."""
    labels, inputs = given["labels"], given.get("decoder_input_ids")
    padding: Padding | None = None
    index: Any = slice(None)
    if not torch.compiler.is_compiling():
        # Labels are read before the encoder runs, while there is no kernel to wait for.
        counted = labels != -100
        padding = Padding.leaving_out(counted.flip(1).cumsum(1).flip(1) > 0)
        index = counted.flatten().nonzero()[:, 0]
    inputs = model._shift_right(labels) if inputs is None else inputs
    encoded = given.get("encoder_outputs")
    if encoded is None:
        encoded = model.encoder(
            **{name: given.get(name) for name in ("input_ids", "attention_mask", "inputs_embeds")}, return_dict=True
        )
    elif not isinstance(encoded, BaseModelOutput):
        encoded = BaseModelOutput(*tuple(encoded)[:1])
    hidden = model.decoder(
        input_ids=inputs, encoder_hidden_states=encoded[0], encoder_attention_mask=given.get("attention_mask"),
        use_cache=False, padding=padding, return_dict=True,
    )[0].flatten(0, 1)[index]  # fmt: skip
    if scales_output(model):
        hidden = hidden * model.model_dim**-0.5
    loss = ops.linear_cross_entropy(hidden, model.lm_head.weight, labels.flatten()[index])
    output = Seq2SeqLMOutput(loss=loss, encoder_last_hidden_state=encoded[0])
    returns = given.get("return_dict")
    return output.to_tuple() if (model.config.return_dict if returns is None else returns) is False else output


def _subclass(stock: Any, *parts: type, **namespace: Any) -> Any:
    """A class of this module with the stock class's name: saving writes that name, pickling finds this one."""
    cls = type(stock)(stock.__name__, (*parts, stock), namespace | {"__module__": __name__})
    globals()[stock.__name__] = cls
    return cls


_PARTS = {
    "Stack": _Stack,
    "Attention": _Attention,
    "LayerNorm": _LayerNorm,
    "DenseGatedActDense": _GatedFeedForward,
}
_STOCK_MODULES = {"T5": modeling_t5, "MT5": modeling_mt5, "UMT5": modeling_umt5}
STACKS = [getattr(module, f"{family}Stack") for family, module in _STOCK_MODULES.items()]
# From each stock class to ours, and back.
FAST: dict[Any, Any] = {
    stock: _subclass(stock, part)
    for family, module in _STOCK_MODULES.items()
    for name, part in _PARTS.items()
    for stock in [getattr(module, family + name)]
} | {nn.Dropout: ops.Dropout}
FUSED: dict[Any, Any] = {
    stock: _subclass(stock, **_with_fused_loss(stock))
    for family, module in _STOCK_MODULES.items()
    for stock in [getattr(module, f"{family}ForConditionalGeneration")]
}
STOCK: dict[Any, Any] = {fast: stock for stock, fast in (FAST | FUSED).items()}

# transformers records hidden states and attention weights by the name of the class.
for _stack in STACKS:
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(FAST[_stack]), _stack._can_record_outputs)
