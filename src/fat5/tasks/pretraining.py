"""Pretraining: an encoder-decoder learns to restore text that a mixture of denoisers has corrupted."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from fat5.data import (
    Manifest,
    PackedBatch,
    PackedLoader,
    PieceStream,
    TokenizerInfo,
    load_tokenizer,
    validation_batches,
)
from fat5.data.text.corpus import is_dataset
from fat5.data.tokenizer.matching import TokenMatch
from fat5.files import file_sha256
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.model.card import CardFacts, training_section, usage_section
from fat5.tasks.config import PretrainConfig
from fat5.tasks.initial import InitialModel, find_initial
from fat5.tasks.samples import PROMPTS, validation_samples
from fat5.tasks.sizes import Text, configure_model, on_meta, open_sources, settle
from fat5.train.checkpoint.state import RunState
from fat5.train.cost.memory import TIGHT, check_memory, plan_memory
from fat5.train.evaluation import Scorer, evaluate, unigram_entropy
from fat5.train.export import export
from fat5.train.run import run
from fat5.train.run_directory import RunDirectory
from fat5.train.world import World

logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Carries out a pretraining run, or the rest of one, in `config.output_dir`.

    Returns and raises as `fat5.train.run.run`.
    """
    with World.here() as world:
        return run(Pretraining.open(settle(config, world), world), world)


@dataclass
class Pretraining:
    """The task of `fat5 pretrain` (`fat5.train.task.Task`)."""

    verb: ClassVar[str] = "pretrain"
    part: ClassVar[str] = "denoiser"

    config: PretrainConfig
    info: TokenizerInfo
    tokenizer: Path
    """Folder whose files go into the model's"""
    loader: PackedLoader
    validation: list[PackedBatch]
    names: list[str]
    """Of the denoisers"""
    manifests: list[Manifest]
    """Of each source"""
    model_config: FAT5Config
    world: World
    initial: InitialModel | None = None
    """What the run begins from, if not from random weights"""

    @classmethod
    def open(cls, config: PretrainConfig, world: World) -> "Pretraining":
        """Opens the sources of a settled configuration; reads little, writes nothing.

        Raises:
            DataError, TokenizerError, ConfigurationError: from the data.
        """
        train, held_out = open_sources(config), open_sources(config, "validation")
        tokenizer = Path(config.data.sources[0].path) / "tokenizer"
        info = load_tokenizer(tokenizer).info
        initial = find_initial(config)
        model_config = configure_model(config, info, initial)
        mixture, batch = config.data.denoisers(), config.data.batch()
        rank, size, workers = world.rank, world.size, config.data.num_workers
        stream = PieceStream(train, mixture, info, batch.max_tokens, config.seed)
        for note in stream.notes() if rank == 0 else []:
            logger.warning(note)
        loader = PackedLoader(stream, batch, rank=rank, world_size=size, num_workers=workers)
        validation = validation_batches(
            held_out, mixture, info, batch, eval_tokens=config.eval_tokens, rank=rank, world_size=size
        )
        manifests = [source.shards.manifest for source in train]
        names = mixture.names()
        return cls(config, info, tokenizer, loader, validation, names, manifests, model_config, world, initial)

    def announce(self, world: World) -> list[str]:
        """Size, work, passes over the data, memory; refuses a run that the memory cannot hold."""
        config, batch, device = self.config, self.config.data.batch(), world.device
        model = on_meta(self.model_config)
        plan, free = plan_memory(config, batch, model, world), world.free_memory()
        check_memory(plan, free)
        text = Text.of(self.loader.stream)
        threads = torch.get_num_threads()
        where = f"{threads} CPU thread{'s' * (threads > 1)}"
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        tokens = batch.packs_per_step * (batch.encoder_tokens + batch.decoder_tokens)
        packs = f"{batch.packs_per_step} pack{'s' * (batch.packs_per_step > 1)}"
        lines = [
            f"model   {name_model(config)}, {model.num_parameters():,} parameters, "
            f"{config.model.position_encoding} positions; {config.precision} on {where}",
            f"step    {tokens:,} tokens: {packs} of {batch.encoder_tokens:,} (encoder) + {batch.decoder_tokens:,} "
            "(decoder)",
            f"run     {config.steps:,} steps, {_short(tokens * config.steps)} tokens; {self._passes(text)} "
            f"over {_short(text.tokens)} tokens of text",
            f"memory  about {plan.describe(free)}",
        ]
        rows = self.beginning
        if rows is not None:
            counts = f"{rows['kept']:,} kept, {rows['averaged']:,} averaged, {rows['fresh']:,} fresh"
            lines.insert(1, f"rows    {model.config.vocab_size:,} embeddings: {counts}")
        if free is not None and plan.total > TIGHT * free:
            lines.append("        that is tight: with less room, lower data.encoder_tokens and data.decoder_tokens")
        return lines

    def build_model(self) -> FAT5ForConditionalGeneration:
        """A model with random weights, or those of `init_from`; a checkpoint of the run replaces either."""
        if self.initial is None or self.match is None:
            return FAT5ForConditionalGeneration(self.model_config)
        return self.initial.build(self.model_config, self.match)

    def objective(self, model: Any) -> Any:
        """The model itself."""
        return model

    def title(self, model: Any) -> str:
        """Preset, size and positions."""
        parameters = model.num_parameters()
        size = f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"{parameters:,}"
        return f"{name_model(self.config)}, {size} parameters, {self.config.model.position_encoding} positions"

    @cached_property
    def match(self) -> TokenMatch | None:
        """Which embeddings of `init_from` those of the model start from; None where they start from elsewhere."""
        if self.initial is None or self.initial.tokenizer is None:
            return None
        return self.initial.match(load_tokenizer(self.tokenizer), self.model_config.vocab_size)

    @property
    def beginning(self) -> dict[str, Any] | None:
        """The folder of `init_from`, the hash of its weights, and how many rows were kept, averaged, fresh."""
        if self.initial is None:
            return None
        rows = self.initial.rows if self.match is None else self.match.counts()
        return {"folder": self.initial.given, "sha256": self.initial.sha256, **(rows or {})}

    @cached_property
    def reference(self) -> tuple[str, float]:
        """The entropy of the validation targets' own frequencies."""
        return "unigram entropy", unigram_entropy(self.validation, self.world)

    def identity(self) -> dict[str, Any]:
        """The configuration, with sources and `init_from` named by hashes instead of paths, and the tokenizer."""
        plain: dict[str, Any] = json.loads(json.dumps(self.config.to_dict()))
        folders = [Path(source.path) for source in self.config.data.sources]
        plain["data"]["sources"] = [file_sha256(folder / "manifest.json") for folder in folders]
        weights = [source.weight for source in self.config.data.sources]
        plain["init_from"] = self.beginning
        return plain | {"tokenizer": self.info.sha256, "vocab_size": self.info.vocab_size, "weights": weights}

    def evaluate(self, scorer: Scorer) -> dict[str, Any]:
        """Loss and accuracy, overall and by denoiser."""
        return score(scorer, self.validation, self.names)

    def rank(self, scores: dict[str, Any]) -> float:
        """The validation loss."""
        return float(scores["loss"])

    def summary(self, state: RunState) -> dict[str, Any]:
        """Unigram entropy of the targets, and the tokens of documents too short to corrupt (below 2 tokens), and
        what the run began from.
        """
        facts = {"unigram_entropy": self.reference[1], "tokens_dropped": sum(self.loader.stream.short_tokens)}
        return facts if self.initial is None else facts | {"init_from": self.beginning}

    def finish(self, scorer: Scorer, run: RunDirectory, warn: Callable[[str], None]) -> dict[str, Any]:
        """`samples`: one validation example of each denoiser, completed greedily."""
        try:
            samples = validation_samples(scorer, load_tokenizer(self.tokenizer), self.validation, self.names)
        except RuntimeError as error:  # memory, above all: a whole run is not lost for its samples
            warn(f"no samples were written: {' '.join(str(error).split())[:200]}")
            samples = []
        return {"samples": samples}

    def export(self, model: Any, run: RunDirectory, summary: dict[str, Any]) -> None:
        """Writes model/, its card on architecture, use and training."""
        tokenizer, language = load_tokenizer(self.tokenizer), (self.config.languages or ["en"])[0]
        before, _, after = PROMPTS.get(language, PROMPTS["en"])[0].partition("___")
        use = usage_section(before, after, "[R]" in tokenizer.own_modes)
        training = training_section(self.config.to_dict(), summary, self.manifests, run.plot.is_file())
        facts = CardFacts(
            name=Path(self.config.output_dir).absolute().name,
            kind="ForConditionalGeneration",
            config=model.config,
            parameters=model.num_parameters(),
            training=f"{use}\n\n{training}",
            languages=self.config.languages,
            datasets=[held.name.removeprefix("hf:") for held in self.manifests if is_dataset(held.name)],
        )
        export(model, self.tokenizer, run, facts)

    def _passes(self, text: Text) -> str:
        taken = text.tokens_a_step(self.config.data.batch()) * self.config.steps
        sources = self.loader.stream.sources
        whole = sum(source.weight for source in sources)
        passes = sorted(taken * source.weight / whole / max(source.shards.num_tokens, 1) for source in sources)
        low, high = (f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in (passes[0], passes[-1]))
        return f"{low} passes" if low == high else f"{low} to {high} passes"


def name_model(config: PretrainConfig) -> str:
    """The preset, or the folder that the run began from."""
    return config.model.preset if config.init_from is None else f"continued from {config.init_from}"


def score(scorer: Scorer, batches: list[PackedBatch], names: list[str]) -> dict[str, Any]:
    """The scores of a model by denoiser, as a row of metrics.jsonl has them."""
    return evaluate(scorer, ((batch, batch.denoiser) for batch in batches), names, Pretraining.part)


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}"
