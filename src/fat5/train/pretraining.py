"""`pretrain(config)`: puts a run together, continues it where it stands, and leaves a model and a summary."""

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from fat5.data import Manifest, PackedLoader, WeightedShards, load_tokenizer, open_shards, validation_batches
from fat5.errors import CheckpointError, ConfigurationError, RunDirectoryError
from fat5.files import whole_folder, write_atomically
from fat5.machine import free_memory
from fat5.model import FAT5Config, FAT5ForConditionalGeneration, quiet
from fat5.model.card import PLOT, CardFacts, training_section, write_card
from fat5.optim import build_optimizer
from fat5.train.checkpoint.compare import check_changes
from fat5.train.checkpoint.files import verify_checkpoint
from fat5.train.checkpoint.store import Choice, read_trainer_state
from fat5.train.config import PretrainConfig
from fat5.train.cost.memory import check_memory, plan_memory
from fat5.train.cost.sizes import Text
from fat5.train.evaluation import evaluate, unigram_entropy
from fat5.train.log.banner import banner
from fat5.train.log.plots import LivePlot, draw_run
from fat5.train.precision import Precision
from fat5.train.resolution import configure_model, on_meta, settle
from fat5.train.run_directory import RunDirectory
from fat5.train.samples import validation_samples
from fat5.train.step import StepRunner
from fat5.train.trainer import Trainer
from fat5.train.world import refuse_many_processes


@dataclass
class RunData:
    """What a run reads: the training stream, the validation batches, and who they are."""

    loader: PackedLoader
    validation: list[Any]
    names: list[str]
    tokenizer: Path
    info: Any
    identity: dict[str, Any]
    """Hashes of the tokenizer and of each source's manifest"""
    manifests: list[Manifest]
    """What each source holds"""
    tokens_dropped: int
    """Tokens of documents below 2 tokens, which no denoiser can corrupt: at most one each"""


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Carries out a pretraining run, or the rest of one, in `config.output_dir`.

    Returns:
        The content of summary.json.

    Raises:
        FAT5Error: something that the user can mend; nothing half-written is left behind.
        RunStopped: a signal stopped the run after its state was saved.
    """
    refuse_many_processes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = settle(config, device)
    data = open_data(config)
    model_config = configure_model(config, data.info)
    announcement = _announce(config, data, model_config, device)
    with RunDirectory(config.output_dir) as run, _determinism(config.deterministic and device.type == "cuda"):
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        model = FAT5ForConditionalGeneration(model_config)
        trainer = _trainer(config, run, model, data, device)
        for line in announcement:
            trainer.display.say(line)
        _continue(trainer, config, run)
        write_atomically(run.config, config.to_yaml())
        trainer.run()
        return _finish(trainer, run, model, data)


def _announce(config: PretrainConfig, data: RunData, model_config: FAT5Config, device: torch.device) -> list[str]:
    """What the run says of itself; refuses one that the memory cannot hold."""
    model = on_meta(model_config)
    plan, free = plan_memory(config, model, device), free_memory(device)
    check_memory(plan, free)
    stream = data.loader.stream
    corpora = [(source.weight, source.shards.num_tokens) for source in stream.sources]
    return banner(config, model.num_parameters(), Text.of(stream), corpora, plan, free, device)


def open_data(config: PretrainConfig) -> RunData:
    """Opens the sources and makes the streams; reads little, writes nothing.

    Raises:
        DataError, TokenizerError, ConfigurationError: from the data.
    """
    folders = [Path(source.path) for source in config.data.sources]
    weights = [source.weight for source in config.data.sources]
    train, held_out = (
        [WeightedShards(open_shards(folder, split), weight) for folder, weight in zip(folders, weights, strict=True)]
        for split in ("train", "validation")
    )
    tokenizer = folders[0] / "tokenizer"
    info = load_tokenizer(tokenizer).info
    mixture, batch = config.data.denoisers(), config.data.batch()
    loader = PackedLoader(train, mixture, info, batch, seed=config.seed, num_workers=config.data.num_workers)
    validation = list(validation_batches(held_out, mixture, info, batch, eval_tokens=config.eval_tokens))
    manifests = [hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest() for folder in folders]
    identity = {"tokenizer": info.sha256, "vocab_size": info.vocab_size, "manifests": manifests, "weights": weights}
    held = [source.shards.manifest for source in train]
    short = sum(loader.stream.short_tokens)
    return RunData(loader, validation, mixture.names(), tokenizer, info, identity, held, short)


def comparable(config: PretrainConfig, identity: dict[str, Any]) -> dict[str, Any]:
    """The configuration with its sources named by what they hold, not by where they lie."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    plain["data"]["sources"] = identity["manifests"]
    return (
        plain
        | {"tokenizer": identity["tokenizer"], "vocab_size": identity["vocab_size"]}
        | {"weights": identity["weights"]}
    )


def step_runner(config: PretrainConfig, model: FAT5ForConditionalGeneration, device: torch.device) -> StepRunner:
    """What makes the steps of a run: the model on its device, in training mode, compiled if asked for, its optimizer.

    Args:
        config: its precision is resolved.
        model: moved to `device`, its weights to the precision's dtype.
    """
    precision = Precision(config.precision, device)
    model.to(device=device, dtype=precision.weight_dtype).train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    compiled = config.compile is True or (config.compile == "auto" and device.type == "cuda")
    # Without `deterministic` the compiler times several forms of a reduction and keeps the fastest: another run may
    # keep another, which rounds otherwise.
    forward = (
        torch.compile(model, fullgraph=True, dynamic=False, options={"deterministic": True}) if compiled else model
    )
    possible = compiled and device.type == "cuda" and precision.scaler is None
    graphs = possible if config.cuda_graphs == "auto" else config.cuda_graphs
    if graphs and not possible:
        how = "compiled" if compiled else "not compiled"
        raise ConfigurationError(
            f"cuda_graphs is true, the model is {how} and runs in {precision.name} on {device.type}",
            hint="CUDA graphs need a GPU and a compiled model, and fp16's loss scale stands outside of them: say auto",
        )
    optimizer = build_optimizer(config.optimizer, model)
    return StepRunner(model, forward, optimizer, precision, config.gradient_clip, graphs)


def _trainer(
    config: PretrainConfig, run: RunDirectory, model: FAT5ForConditionalGeneration, data: RunData, device: torch.device
) -> Trainer:
    runner = step_runner(config, model, device)
    parameters = model.num_parameters()
    size = f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"{parameters:,}"
    title = f"{config.model.preset}, {size} parameters, {config.model.position_encoding} positions"
    return Trainer(
        config=config,
        run=run,
        model=model,
        runner=runner,
        loader=data.loader,
        evaluation=partial(evaluate, runner.forward, model, data.validation, data.names, runner.precision),
        configuration=comparable(config, data.identity),
        model_config=_model_config_text(model),
        plot=LivePlot(partial(draw_run, run.metrics, run.plot, title, unigram_entropy(data.validation))),
    )


def _continue(trainer: Trainer, config: PretrainConfig, run: RunDirectory) -> None:
    """Takes over the checkpoint that `config.resume` asks for, says which and why, and cuts the log to fit."""
    leftovers = trainer.store.sweep()
    if leftovers:
        trainer.events.write("swept", leftovers=leftovers)
    choice = _choose(trainer, config, run)
    if choice is None:
        trainer.cut_log(-1)
        trainer.events.write("started", pid=os.getpid())
        return
    warnings = check_changes(read_trainer_state(choice.folder)["configuration"], trainer.configuration, choice.folder)
    trainer.restore(choice.folder)
    trainer.cut_log(trainer.progress.step)
    for refused in choice.refused:
        trainer.display.warn(f"checkpoint passed over: {refused}")
    for warning in warnings:
        trainer.display.warn(warning)
    why = "named by resume" if config.resume != "auto" else "the newest that verifies"
    trainer.display.say(f"continuing from {choice.folder} ({why})")
    trainer.events.write(
        "resumed", checkpoint=choice.folder.name, why=why, refused=choice.refused, warnings=warnings, pid=os.getpid()
    )


def _choose(trainer: Trainer, config: PretrainConfig, run: RunDirectory) -> Choice | None:
    if config.resume == "auto":
        return trainer.store.choose(config.strict)
    steps = trainer.store.steps()
    if config.resume == "never":
        if steps or run.metrics.exists():
            raise RunDirectoryError(
                "holds a run, and resume is never",
                where=run.path,
                hint="Choose a new output_dir, or set resume to auto",
            )
        return None
    folder = Path(config.resume)
    manifest = verify_checkpoint(folder)
    if steps and steps[-1] > manifest["step"]:
        raise CheckpointError(
            f"is of step {manifest['step']}, and {run.path} has a newer checkpoint of step {steps[-1]}",
            where=folder,
            hint="Give a new output_dir, or remove the newer checkpoints",
        )
    return Choice(folder)


def _finish(trainer: Trainer, run: RunDirectory, model: FAT5ForConditionalGeneration, data: RunData) -> dict[str, Any]:
    """The model folder, the last drawing, and summary.json, which is written last."""
    trainer.plot.finish()
    progress = trainer.progress
    first, last = progress.first_evaluation, progress.last_evaluation
    if first is None or last is None:
        raise RuntimeError("a run ended without an evaluation")
    summary = {
        "parameters": model.num_parameters(),
        "steps": progress.step,
        "seconds": progress.seconds,
        "train_tokens": progress.tokens,
        "raw_tokens": progress.raw_tokens,
        "tokens_per_second": progress.tokens / progress.step_seconds,
        "val_loss_first": first["loss"],
        "val_loss_last": last["loss"],
        "val_accuracy_last": last["accuracy"],
        "val_loss_by_denoiser": {name: score["loss"] for name, score in last["by_denoiser"].items()},
        "unigram_entropy": unigram_entropy(data.validation),
        "encoder_fill": progress.encoder_tokens / progress.encoder_room,
        "decoder_fill": progress.decoder_tokens / progress.decoder_room,
        "tokens_dropped": data.tokens_dropped,
        "precision": trainer.runner.precision.name,
        "device": str(trainer.runner.device),
    }
    plot = run.plot if run.plot.is_file() else None
    training = training_section(trainer.config.to_dict(), summary, data.manifests, plot is not None)
    export(model, data.tokenizer, run.model, training, plot)
    try:
        summary["samples"] = validation_samples(
            model, load_tokenizer(data.tokenizer), data.validation, data.names, trainer.runner.precision
        )
    except RuntimeError as error:  # memory, above all: a whole run is not lost for its samples
        summary["samples"] = []
        trainer.display.warn(f"no samples were written: {' '.join(str(error).split())[:200]}")
    write_atomically(run.summary, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    trainer.events.write("finished", step=progress.step)
    return summary


def export(
    model: FAT5ForConditionalGeneration, tokenizer: Path, target: Path, training: str = "", plot: Path | None = None
) -> None:
    """Writes a folder that `AutoModelForSeq2SeqLM` and `AutoTokenizer` load, with its card; the old one stands until
    this is whole.

    Args:
        model: to save.
        tokenizer: folder whose files are copied.
        target: the folder.
        training: section of the card on the training; plot: a picture that it shows.
    """
    with whole_folder(target) as folder:
        try:
            with quiet():
                model.save_pretrained(folder)
        except SafetensorError as error:  # its only fault here is the disk's
            raise OSError(f"{target} cannot be written: {error}") from error
        for file in sorted(tokenizer.iterdir()):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        if plot is not None:
            shutil.copyfile(plot, folder / PLOT)
        stock = json.loads((folder / "config.json").read_text())["model_type"] != "fat5"
        facts = CardFacts(
            name=target.absolute().parent.name,
            kind="ForConditionalGeneration",
            config=model.config,
            parameters=model.num_parameters(),
            target="hf" if stock else "fat5",
            training=training,
        )
        write_card(folder, facts)


def _model_config_text(model: FAT5ForConditionalGeneration) -> str:
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return (Path(folder) / "config.json").read_text()


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Deterministic kernels while a run lasts."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
