"""The base class of every FAT5 model: initialisation, tied weights, safe loading and saving."""

import logging
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from fat5.errors import CheckpointError, CheckpointShapeError
from fat5.model.configuration import EXACT_ATTENTION, FAMILIES, FAT5Config
from fat5.model.layers import Attention, FeedForward, GatedFeedForward, HeadProjection, RMSNorm
from fat5.model.loading import generation_settings, quiet, readable, weight_source
from fat5.model.padding import Segments, shift_right
from fat5.model.positions import AbsolutePositions, Fire
from fat5.model.stack import Stack

logger = logging.getLogger(__name__)
# safetensors.torch.save_model keeps the alphabetically first name of a shared table.
_TABLE = {r"decoder\.embed_tokens\.weight$": "shared.weight"}


class FAT5PreTrainedModel(PreTrainedModel):
    """A model with T5's initialisation and complete safetensors checkpoints, which stock classes read if positions are
    T5's.
    """

    config_class = FAT5Config
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # FAT5's attention computes what sdpa does.
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["Block"]
    _can_compile_fullgraph = True
    # Stock T5 v1.0 checkpoints hold a table of cross-attention that no T5 reads.
    _keys_to_ignore_on_load_unexpected: ClassVar = [
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    ]

    # T5's feed-forward overflows float16; bfloat16 has the range of float32.
    _keep_in_fp32_modules: ClassVar = ["wo"]
    _head_weights: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        if not isinstance(config, FAT5Config):
            raise TypeError(
                f"config: expected a FAT5Config, got a {type(config).__name__}; FAT5Config.from_stock(config) makes "
                "one of any T5's"
            )
        super().__init__(config)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Both stacks always share one embedding; the output projection is tied to it only if the configuration says
        so.
        """
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[no-any-return]
        mine = dict(self._tied_weights_keys or {})
        if not self.config.tie_word_embeddings:
            mine.pop("lm_head.weight", None)
        return mine

    def _shift_right(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Decoder inputs from labels, or from a text, (B, U) or packed (U,): moved one to the right behind the start
        token, inside each document.
        """
        pad = self.config.pad_token_id if self.config.pad_token_id is not None else 0
        start = self.config.decoder_start_token_id
        positions = Segments(cu_seqlens, ids.shape[-1]).positions(ids)
        return shift_right(ids, positions, pad if start is None else start, pad)

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **asked: Any,
    ) -> BaseModelOutput:
        """Padded rows or packed documents through the encoder; see `FAT5EncoderModel.forward`."""
        self.refuse_unread_embeddings()
        encoder: Any = self.encoder
        if cu_seqlens is None:
            if max_seqlen is not None:
                raise ValueError("cu_seqlens: packed documents need it beside max_seqlen, got None")
            return encoder(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **asked)  # type: ignore[no-any-return]
        if max_seqlen is None:
            raise ValueError("max_seqlen: packed documents need it beside cu_seqlens, got None")
        asked = {name: value or None for name, value in asked.items()}
        refuse_given(
            "packed documents (cu_seqlens) take none; give padded rows", attention_mask=attention_mask, **asked
        )
        segments = Segments(cu_seqlens, max_seqlen)
        return BaseModelOutput(encoder(input_ids, segments, inputs_embeds=inputs_embeds, **asked))

    def returned(self, output: Any, return_dict: bool | None) -> Any:
        """`output`, or its tuple if the caller or the configuration wants one."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Maps every stock name of exact attention to FAT5's one attention, which picks its kernel by device.

        Returns "eager" if asked for, else "sdpa"; transformers makes its masks accordingly. Attention weights can be
        returned under both. Flash attention, which cannot add T5's bias, is refused, as in stock T5.
        """
        if requested_attention is None or requested_attention in EXACT_ATTENTION:
            return "eager" if requested_attention == "eager" else "sdpa"
        return super().get_correct_attn_implementation(requested_attention, is_init_check)  # type: ignore[no-any-return]

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.shared  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Module) -> None:
        base = self.base_model
        base.shared = value
        for stack in ("encoder", "decoder"):
            if hasattr(base, stack):
                getattr(base, stack).embed_tokens = value

    def refuse_unread_embeddings(self) -> None:
        """Raises ValueError if an adapter replaced `shared`, which no stack reads."""
        if isinstance(self.encoder.embed_tokens, nn.Embedding) and not isinstance(self.shared, nn.Embedding):
            raise ValueError(
                f"shared: the {type(self.shared).__name__} in its place has no effect, since each stack reads its own "
                "embed_tokens; adapt embed_tokens"
            )

    def enable_input_require_grads(self) -> None:
        """As in transformers, on the embeddings that the stacks read."""
        super().enable_input_require_grads()
        for module in self.modules():
            if isinstance(module, Stack):
                hook = module.embed_tokens.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
                self._require_grads_hooks.append(hook)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # is_custom_code=True would skip modules without parameters of their own, such as Attention.
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        """T5's initialisation, all normal: embeddings with standard deviation 1, projections with the inverse root of
        their input width, q with (d_model * d_kv)^-0.5, which takes the place of 1/sqrt(d_kv) on the scores.
        """
        config = self.config
        factor, width = config.initializer_factor, config.d_model

        def normal(layer: nn.Module, deviation: float) -> None:
            init.normal_(layer.weight, mean=0.0, std=factor * deviation)

        if isinstance(module, RMSNorm):
            init.constant_(module.weight, factor)
        elif isinstance(module, Attention):
            normal(module.q, (width * config.d_kv) ** -0.5)
            normal(module.k, width**-0.5)
            normal(module.v, width**-0.5)
            normal(module.o, (config.num_heads * config.d_kv) ** -0.5)
            if module.has_relative_attention_bias:
                normal(module.relative_attention_bias, width**-0.5)
        elif isinstance(module, GatedFeedForward):
            normal(module.wi_0, width**-0.5)
            normal(module.wi_1, width**-0.5)
            normal(module.wo, config.d_ff**-0.5)
        elif isinstance(module, FeedForward):
            normal(module.wi, width**-0.5)
            normal(module.wo, config.d_ff**-0.5)
        elif isinstance(module, HeadProjection):
            normal(module, module.in_features**-0.5)
            init.zeros_(module.bias)
        elif isinstance(module, AbsolutePositions):
            if module.learned:
                normal(module.embedding, 1.0)
        elif isinstance(module, Fire):
            for layer in (module.hidden, module.output):
                init.normal_(layer.weight, mean=0.0, std=factor * layer.in_features**-0.5)
                init.zeros_(layer.bias)
            init.constant_(module.slope, 1.0)
            init.constant_(module.threshold, 512.0)
        elif isinstance(module, PreTrainedModel) and hasattr(module, "shared"):
            normal(module.shared, 1.0)
            if hasattr(module, "lm_head") and not config.tie_word_embeddings:
                normal(module.lm_head, width**-0.5)  # T5X's; transformers takes 1 (decision 0034)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, for folders of FAT5, of stock T5, mT5 and umT5, and of the first FAT5 (flash_t5).

        Reads safetensors, or a pytorch_model.bin with weights_only=True, and refuses an incomplete checkpoint. Only the
        weights of a head may be missing: they are initialised, with one warning. `config` may be a stock configuration;
        `state_dict` replaces the folder's weights.

        Raises:
            CheckpointError: damaged or unsafe files, or a tensor that is missing, misshapen or unknown.
        """
        where = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        allows_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        if kwargs.get("weights_only") is False:
            raise CheckpointError("weights_only=False would run what a pickle holds, and is refused", where=where)
        if type(kwargs.get("config")) in FAMILIES.values():
            kwargs["config"] = FAT5Config.from_stock(kwargs["config"])
        with readable(where), quiet(bars=True):
            if where is not None and kwargs.get("state_dict") is None:
                kwargs |= weight_source(where, kwargs)
            elif where is not None and kwargs.get("config") is None:
                kwargs["config"] = where
            kwargs["key_mapping"] = _TABLE | (kwargs.get("key_mapping") or {})
            given = None if "state_dict" in kwargs else where
            try:
                model, info = super().from_pretrained(
                    given, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
                )
            except NotImplementedError as error:
                if "aten::equal" not in str(error):
                    raise
                # transformers compared two tables that it had left out for their shape, which have no numbers yet
                raise CheckpointShapeError(
                    "the tensors are of another shape than the configuration wants",
                    where=where,
                    hint="config.json does not belong to these weights",
                ) from error
        # transformers would rename the tensors back at saving.
        renamings = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [one for one in renamings if one.source_patterns != list(_TABLE)]
        if given is None and where is not None and model.can_generate() and "generation_config" not in kwargs:
            model.generation_config = generation_settings(where, kwargs) or model.generation_config
        cls._check_tensors(info, where, allows_mismatch, model.config.architectures, warns=not wants_info)
        # A stock T5 that was saved again always says "tied", so the weights decide.
        if hasattr(model, "lm_head") and model.lm_head.weight is not model.shared.weight:
            model.config.tie_word_embeddings = False
        return (model, info) if wants_info else model

    @classmethod
    def _check_tensors(
        cls, info: dict[str, Any], where: Any, allows_mismatch: bool, named: list[str] | None, warns: bool
    ) -> None:
        """Raises CheckpointError unless the tensors are those of this class.

        Args:
            named: the classes that the checkpoint's configuration names.
            warns: of newly initialised weights; a caller that asks for the loading's information reads them there.
        """
        fresh = {name for name in info["missing_keys"] if name.startswith(cls._head_weights)}
        missing = sorted(set(info["missing_keys"]) - fresh)
        if missing:
            raise CheckpointError(
                f"lacks {len(missing)} tensors, {missing[0]} among them",
                where=where,
                hint=f"it holds a {named[0]}, read here as {cls.__name__}"
                if named and not named[0].endswith(cls.__name__.removeprefix("FAT5"))
                else "the checkpoint is incomplete or of another architecture",
            )
        mismatched = sorted(info["mismatched_keys"])
        if mismatched and not allows_mismatch:
            name, found, wanted = mismatched[0]
            raise CheckpointShapeError(
                f"{name} has shape {tuple(found)}, the configuration wants {tuple(wanted)}",
                where=where,
                hint="ignore_mismatched_sizes=True initialises a new head"
                if cls._head_weights and name.startswith(cls._head_weights)
                else "config.json does not belong to these weights",
            )
        extra = sorted(info["unexpected_keys"])
        if extra:
            raise CheckpointError(
                f"holds {len(extra)} tensors that {cls.__name__} has no place for, {extra[0]} among them",
                where=where,
                hint="config.json does not belong to these weights, or they are of another architecture",
            )
        told = sorted(fresh) + [
            f"{name} ({tuple(wanted)} here, {tuple(found)} in the checkpoint)" for name, found, wanted in mismatched
        ]
        if told and warns:
            logger.warning("%s: %s are newly initialised; train them before use", cls.__name__, ", ".join(told))


def refuse_given(reason: str, **given: Any) -> None:
    """Raises ValueError for the first argument that is not None."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: {reason}")
