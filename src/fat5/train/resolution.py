"""From what a recipe says to the configuration that a run has, and the model's configuration in it."""

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from fat5.data import TokenizerInfo, load_tokenizer
from fat5.errors import ConfigurationError
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.model.configuration import MODEL_KEYS
from fat5.train.checkpoint.files import verify_checkpoint
from fat5.train.checkpoint.store import read_trainer_state
from fat5.train.config import PretrainConfig
from fat5.train.cost.sizes import choose_sizes, open_keys, take_over
from fat5.train.precision import resolve_precision
from fat5.train.run_directory import RunDirectory
from fat5.yaml_text import read_yaml


def settle(config: PretrainConfig, device: torch.device, stand_in: TokenizerInfo | None = None) -> PretrainConfig:
    """The configuration that a run has: defaults filled in, precision resolved, sizes chosen or taken from the run that
    the folder holds already.

    Args:
        stand_in: for the tokenizer, where the data is not prepared yet.

    Raises:
        FAT5Error: what cannot work.
    """
    config = config.resolved()
    config = replace(config, precision=resolve_precision(config.precision, device))
    if open_keys(config):
        config = take_over(config, _earlier(config))

    def model_of(config: PretrainConfig) -> FAT5ForConditionalGeneration:
        tokenizer = Path(config.data.sources[0].path) / "tokenizer"
        return on_meta(configure_model(config, stand_in or load_tokenizer(tokenizer).info))

    return choose_sizes(config, device, model_of, prepared=stand_in is None).resolved()


def configure_model(config: PretrainConfig, info: Any) -> FAT5Config:
    """The model's configuration for the tokenizer's vocabulary.

    Raises:
        ConfigurationError: an override that the model's configuration does not have.
    """
    ours = ("vocab_size", "pad_token_id", "eos_token_id", "decoder_start_token_id", "position_encoding")
    for key in config.model.overrides:
        if key in ours:
            raise ConfigurationError(f"model.overrides.{key} is set by the run itself", hint="Remove it")
        if key not in MODEL_KEYS:
            near = get_close_matches(key, sorted(MODEL_KEYS), n=1)
            hint = f"Did you mean {near[0]}?" if near else "See docs/model.md for the keys"
            raise ConfigurationError(f"model.overrides has no key {key!r}", hint=hint)
    try:
        return FAT5Config.preset(
            config.model.preset,
            vocab_size=info.vocab_size,
            position_encoding=config.model.position_encoding,
            pad_token_id=info.pad_id,
            eos_token_id=info.eos_id,
            decoder_start_token_id=info.pad_id,
            **config.model.overrides,
        )
    except (StrictDataclassError, TypeError, AttributeError) as error:
        # transformers says on several lines which key has which type; the last of them is enough.
        said = str(error).splitlines()[-1].strip()
        raise ConfigurationError(said, where="model.overrides", hint="See docs/model.md for the keys") from error


def on_meta(config: FAT5Config) -> FAT5ForConditionalGeneration:
    """The model of a configuration, its weights without memory."""
    with torch.device("meta"):
        return FAT5ForConditionalGeneration(config)


def _earlier(config: PretrainConfig) -> dict[str, Any]:
    """The configuration of the run that is continued; empty for a new one."""
    if config.resume not in ("auto", "never"):
        verify_checkpoint(Path(config.resume))
        configuration: dict[str, Any] = read_trainer_state(Path(config.resume))["configuration"]
        return configuration
    run = RunDirectory(config.output_dir)
    return (
        read_yaml(run.config, run.config) if config.resume == "auto" and run.holds_run and run.config.exists() else {}
    )
