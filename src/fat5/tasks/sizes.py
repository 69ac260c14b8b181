"""Sizes that a configuration leaves open (`auto`): chosen once, from the corpus and the device, and kept by the run.

A run writes what was chosen into its config.yaml, and the same command takes it from there when it continues.

settle            the configuration of a run, from that of a recipe       choose_sizes   the sizes alone
configure_model   the model's configuration
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from fat5.data import (
    BatchConfig,
    PieceStream,
    TokenizerInfo,
    WeightedShards,
    load_tokenizer,
    open_shards,
    suggest_budgets,
)
from fat5.data.examples.config import BUDGET_MULTIPLE, EXAMPLE_TOKENS, rounded_up
from fat5.errors import ConfigurationError
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.model.configuration import MODEL_KEYS
from fat5.tasks.config import INIT_FROM, DataConfig, PretrainConfig
from fat5.tasks.initial import InitialModel, adopt, find_initial
from fat5.train.checkpoint.files import verify_checkpoint
from fat5.train.checkpoint.state import read_trainer_state
from fat5.train.cost.memory import plan_memory
from fat5.train.precision import resolve_precision
from fat5.train.run_directory import RunDirectory
from fat5.train.world import World
from fat5.yaml_text import read_yaml

PASSES = 4
"""Passes over the data: to about four, text seen again is worth nearly what new text is (Muennighoff et al. 2023)."""

FEWEST_STEPS, MOST_STEPS = 500, 100_000
"""A small corpus is passed over more often than PASSES, a large one less."""

STEPS_WANTED = 1_000
"""A step is as large as leaves the run this many, within the bounds of a step."""

SMALLEST_PACK, LARGEST_PACK, LARGEST_PACK_CPU, MOST_PACKS = 1_024, 16_384, 2_048, 8
"""Encoder tokens of a pack, and packs of a step of 16,384. A CPU gains nothing from longer packs."""

LARGE_CORPUS = 1_000_000_000
"""Tokens of text from which fat5-base is chosen on a GPU."""

SHARE_OF_MEMORY = 0.8
"""Packs are chosen to need at most this share of the free memory: the plan may be some tenths off."""

TYPICAL_FILL = 0.97
MEASURED_EXAMPLES = 16_384
SENTINELS = 256
"""Of the tokenizers that `fat5 tokenizer` makes. Fewer make longer spans, and no longer targets."""

OPEN = (
    "model.preset",
    "model.position_encoding",
    "data.max_tokens",
    "data.encoder_tokens",
    "data.decoder_tokens",
    "data.packs_per_step",
    "data.max_examples",
    "data.num_workers",
    "steps",
    "eval_every",
    "eval_tokens",
    "schedule.warmup_steps",
)
"""The keys that may say auto (the warm-up: null)."""


@dataclass(frozen=True)
class Text:
    """The statistics of the training text that sizes depend on."""

    tokens: int
    """Tokens of the training split, of all sources"""
    piece: float
    """Mean tokens of a piece, and mean encoder and decoder tokens of its example"""
    encoder: float
    decoder: float
    encoder_deviation: float
    """Standard deviation of the encoder's tokens"""

    @classmethod
    def of(cls, stream: PieceStream) -> "Text":
        """Measured on the first examples of a stream."""
        seen = stream.resolve(np.arange(MEASURED_EXAMPLES))
        tokens = sum(source.shards.num_tokens for source in stream.sources)
        piece, encoder, decoder = (float(lengths.mean()) for lengths in (seen.length, seen.encoder, seen.decoder))
        return cls(tokens, piece, encoder, decoder, float(seen.encoder.std()))

    def most_examples(self, encoder_tokens: int) -> int:
        """Examples that a pack of so many encoder tokens rarely exceeds, a multiple of 8.

        A pack of mean m examples has about m + sqrt(m) * deviation / mean of them (renewal process); four deviations.
        """
        mean = encoder_tokens / self.encoder
        most = mean + 4 * mean**0.5 * self.encoder_deviation / self.encoder
        return max(8, min(encoder_tokens // EXAMPLE_TOKENS, -(-math.ceil(most) // 8) * 8))

    def tokens_a_step(self, batch: BatchConfig) -> float:
        """Tokens of text that a step takes in."""
        examples = min(batch.encoder_tokens / self.encoder, batch.decoder_tokens / self.decoder) * TYPICAL_FILL
        return min(examples, batch.examples_per_pack) * self.piece * batch.packs_per_step


WEB_PAGES = Text(10 * LARGE_CORPUS, piece=500.0, encoder=313.0, decoder=223.0, encoder_deviation=230.0)
"""Assumed if the data is not prepared yet: French web pages under the mixture fat5."""


def settle(config: PretrainConfig, world: World, stand_in: TokenizerInfo | None = None) -> PretrainConfig:
    """The configuration of a run: defaults filled in, precision resolved, sizes chosen, or taken from the run that is
    already in the folder.

    Args:
        stand_in: a tokenizer if the data is not prepared yet.

    Raises:
        FAT5Error: what cannot work.
    """
    config = config.resolved()
    config = replace(config, precision=resolve_precision(config.precision, world.device))
    initial = find_initial(config)
    if initial is not None:
        config = adopt(config, initial)
    if open_keys(config):
        config = take_over(config, _earlier(config))
    if initial is None and config.model.preset == INIT_FROM:
        raise ConfigurationError(
            f"model.preset is {INIT_FROM}, and init_from is not given",
            hint="Give the folder that the run began from: --init_from FOLDER",
        )
    if open_keys(config):  # from the memory of one device: the main process chooses for all
        chosen = choose_sizes(config, world, stand_in, initial).to_dict() if world.is_main else {}
        config = take_over(config, world.broadcast(chosen))
    return choose_sizes(config, world, stand_in, initial).resolved()


def open_keys(config: PretrainConfig) -> list[str]:
    """The keys of a configuration that are still to be chosen."""
    return [key for key in OPEN if attrgetter(key)(config) in ("auto", None)]


def take_over(config: PretrainConfig, earlier: Mapping[str, Any]) -> PretrainConfig:
    """A copy whose open keys have the values of another configuration, such as the run's config.yaml."""
    for key in open_keys(config):
        value: Any = earlier
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int | str) and value != "auto":
            config = _with(config, key, value)
    return config


def choose_sizes(
    config: PretrainConfig,
    world: World,
    stand_in: TokenizerInfo | None = None,
    initial: InitialModel | None = None,
) -> PretrainConfig:
    """A copy in which every size is a number.

    Args:
        config: its precision is resolved.
        world: the memory of its device, and the processes that share a step.
        stand_in: a tokenizer if the data is not prepared yet; the text is then taken to be WEB_PAGES.
        initial: what the run begins from.

    Raises:
        DataError, TokenizerError, ConfigurationError: from the data, or numbers that do not go together.
    """
    gpu = world.device.type == "cuda"
    if not open_keys(config):
        return config
    prepared = stand_in is None
    tokens = sum(source.shards.num_tokens for source in open_sources(config)) if prepared else WEB_PAGES.tokens
    on_gpu = "fat5-base" if tokens >= LARGE_CORPUS else "fat5-small"
    model = {"preset": on_gpu if gpu else "fat5-demo", "position_encoding": "t5"}
    config = take_over(config, {"model": model, "data": {"num_workers": 2 if gpu else 0}})
    data = _pack(config.data, tokens, LARGEST_PACK if gpu else LARGEST_PACK_CPU)
    asked = config.data
    text = Text.of(_stream(replace(config, data=data))) if prepared else replace(WEB_PAGES, tokens=tokens)
    config = replace(config, data=_rest(data, asked, text, world.size))
    if asked.encoder_tokens == "auto":
        info = stand_in or _tokenizer(config)
        config = _fit_memory(config, asked, text, world, configure_model(config, info, initial))
    return _length(config, text)


def configure_model(config: PretrainConfig, info: Any, initial: InitialModel | None = None) -> FAT5Config:
    """The model's configuration for the tokenizer's vocabulary, from what the run begins from or from its preset.

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
        if initial is not None:
            return initial.configure(config.model.overrides, info)
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
        return _with_slots(read_trainer_state(Path(config.resume))["configuration"])
    run = RunDirectory(config.output_dir)
    written = config.resume == "auto" and run.holds_run and run.config.exists()
    return _with_slots(read_yaml(run.config, run.config)) if written else {}


def _with_slots(earlier: dict[str, Any]) -> dict[str, Any]:
    """Packs of runs written before max_examples was chosen closed at a sixteenth of encoder_tokens."""
    data = earlier.get("data")
    if isinstance(data, dict) and data.get("max_examples", 0) is None and isinstance(data.get("encoder_tokens"), int):
        data["max_examples"] = max(8, data["encoder_tokens"] // EXAMPLE_TOKENS)
    return earlier


def _pack(data: DataConfig, tokens: int, largest: int) -> DataConfig:
    """max_tokens and encoder_tokens: a power of two such that the run has STEPS_WANTED steps, four pieces or more."""
    encoder, longest = data.encoder_tokens, data.max_tokens
    if encoder == "auto":
        wanted = max(1, PASSES * tokens // STEPS_WANTED)
        encoder = max(SMALLEST_PACK, min(largest, 1 << (wanted.bit_length() - 1)))
        if longest != "auto":
            encoder = max(encoder, rounded_up(4 * longest))
    if longest == "auto":
        longest = min(1_024, max(2, encoder // 4))
    return replace(data, encoder_tokens=encoder, max_tokens=longest)


def _rest(data: DataConfig, asked: DataConfig, text: Text, processes: int) -> DataConfig:
    """decoder_tokens in the ratio of the lengths, packs_per_step, which the processes share, and max_examples."""
    decoder, packs, examples = asked.decoder_tokens, asked.packs_per_step, asked.max_examples
    if decoder == "auto":
        longest = max(data.denoisers().max_lengths(data.max_tokens, SENTINELS)[1], 1)
        suggested = suggest_budgets(text.encoder, text.decoder, data.encoder_tokens)[1]
        decoder = max(suggested, rounded_up(longest))
    if packs == "auto":
        most = MOST_PACKS * LARGEST_PACK // data.encoder_tokens
        wanted = PASSES * text.tokens // STEPS_WANTED // data.encoder_tokens
        at_once = max(1, data.packs_per_micro_batch) * processes
        packs = max(1, min(most, wanted) // at_once) * at_once
    if examples in ("auto", None):
        examples = text.most_examples(data.encoder_tokens)
    return replace(data, decoder_tokens=decoder, packs_per_step=packs, max_examples=examples)


def _fit_memory(
    config: PretrainConfig, asked: DataConfig, text: Text, world: World, model_config: FAT5Config
) -> PretrainConfig:
    """Halves the pack until the plan fits what is free, with as many more packs a step."""
    free, model = world.free_memory(), on_meta(model_config)
    while free is not None and plan_memory(config, config.data.batch(), model, world).total > SHARE_OF_MEMORY * free:
        half = config.data.encoder_tokens // 2
        longest = min(1_024, half // 4) if asked.max_tokens == "auto" else asked.max_tokens
        if half < max(SMALLEST_PACK, 2 * longest) or half % BUDGET_MULTIPLE:
            break
        smaller = replace(config.data, encoder_tokens=half, max_tokens=longest)
        config = replace(config, data=_rest(smaller, asked, text, world.size))
    return config


def _length(config: PretrainConfig, text: Text) -> PretrainConfig:
    """steps, and the evaluations among them."""
    taken = text.tokens_a_step(config.data.batch())
    if config.steps == "auto":
        steps = round(PASSES * text.tokens / taken)
        config = replace(config, steps=max(FEWEST_STEPS, min(MOST_STEPS, steps)))
    if config.eval_every == "auto":
        config = replace(config, eval_every=max(1, min(500, config.steps // 5)))
    if config.eval_tokens == "auto":
        config = replace(config, eval_tokens=max(1_024, min(65_536, int(config.steps * taken) // 256)))
    return replace(config, schedule=config.schedule.resolved(config.steps))


def open_sources(config: PretrainConfig, split: str = "train") -> list[WeightedShards]:
    """One split of the prepared folders that a configuration names, with their weights."""
    return [WeightedShards(open_shards(source.path, split), source.weight) for source in config.data.sources]


def _stream(config: PretrainConfig) -> PieceStream:
    """The run's stream, but for its seed: sizes are the same under every seed."""
    info, data = _tokenizer(config), config.data
    return PieceStream(open_sources(config), data.denoisers(), info, data.max_tokens, seed=0)


def _tokenizer(config: PretrainConfig) -> TokenizerInfo:
    return load_tokenizer(Path(config.data.sources[0].path) / "tokenizer").info


def _with(config: PretrainConfig, key: str, value: Any) -> PretrainConfig:
    room, _, name = key.rpartition(".")
    if not room:
        return replace(config, **{name: value})
    return replace(config, **{room: replace(getattr(config, room), **{name: value})})
