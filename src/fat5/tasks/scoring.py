"""`evaluate_model(config)`: the scores of a finished model on a task, or by denoiser on prepared text."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from fat5.data import BatchConfig, MixtureOfDenoisers, WeightedShards, load_tokenizer, validation_batches
from fat5.data.examples.order import open_weighted
from fat5.data.text.corpus import SAMPLE, is_dataset
from fat5.errors import CheckpointError, ConfigurationError, TokenizerError
from fat5.model import load_model
from fat5.tasks.config import EvaluateConfig
from fat5.tasks.finetune.config import TaskName
from fat5.tasks.pretraining import score
from fat5.train.checkpoint.store import model_folder
from fat5.train.evaluation import Scorer, unigram_entropy
from fat5.train.precision import Precision, resolve_precision
from fat5.train.run_directory import runs_of_seeds
from fat5.train.world import World, training_device
from fat5.yaml_text import read_yaml

OF_TASKS = (
    "columns", "prefix", "tokenizer", "subset", "languages", "max_examples", "max_source_tokens", "max_target_tokens",
    "too_long", "stride", "num_beams", "max_new_tokens", "predict_batch", "predictions",
)  # fmt: skip
OF_DENOISERS = ("weights", "mixture", "eval_tokens", "max_tokens", "decoder_tokens")


def evaluate_model(config: EvaluateConfig) -> dict[str, Any]:
    """Scores a model.

    Returns:
        Of a task: the content of results.json (`fat5.tasks.results.results_of`). Of denoisers: model, loss, accuracy,
        tokens, unigram_entropy, and by_denoiser: name → loss, accuracy, tokens.

    Raises:
        ConfigurationError, DataError: keys or data that cannot be, or that do not go together.
        CheckpointError: no model there, a damaged one, or one without the task's head; pickles are refused by name.
        TokenizerError: no tokenizer, or the data was prepared with another than the model's.
    """
    if not config.model:
        raise ConfigurationError(
            "model is not given", hint="Give the folder of a run, a model or a checkpoint: --model DIR"
        )
    folder = Path(config.model)
    if not folder.exists():
        raise CheckpointError("does not exist", where=folder, hint="Give the folder of a run, a model or a checkpoint")
    if runs_of_seeds(folder):
        model_folder(folder)  # says which one to give
    recipe = _recipe(folder)
    if _is_of_a_task(config, recipe):
        from fat5.tasks.finetune.evaluating import evaluate_task

        return evaluate_task(config, recipe)
    if "task" in recipe:  # prepared text says nothing of the shapes of a task's examples
        recipe = {"precision": recipe.get("precision", "auto")}
    sources = _sources(config, recipe)
    device = training_device()
    precision = Precision(resolve_precision(config.precision or recipe.get("precision", "auto"), device), device)
    info = load_tokenizer(sources[0].shards.folder / "tokenizer").info
    data = recipe.get("data", {})
    mixture = MixtureOfDenoisers.of(data.get("mixture", "fat5") if config.mixture is None else config.mixture)
    given = {item.name: getattr(config, item.name, None) for item in fields(BatchConfig)}
    shapes = {key: data.get(key) if value is None else value for key, value in given.items()}
    batch = BatchConfig(**{key: value for key, value in shapes.items() if value is not None})
    eval_tokens = config.eval_tokens if config.eval_tokens is not None else recipe.get("eval_tokens", 65536)
    batches = validation_batches(sources, mixture, info, batch, eval_tokens=eval_tokens)
    weights = model_folder(folder)
    _check_tokenizer(weights, info)
    model = load_model(weights, device=device, dtype=precision.weight_dtype)
    if model.config.vocab_size < info.vocab_size:
        raise TokenizerError(
            f"the model has {model.config.vocab_size:,} token ids and the data {info.vocab_size:,}",
            where=weights,
            hint="Prepare the data with the model's tokenizer",
        )
    row = score(Scorer(model, precision, World(device), model), batches, mixture.names())
    if not math.isfinite(row["loss"]):
        raise CheckpointError(
            f"its loss on this data is {row['loss']} in {precision.name}",
            where=weights,
            hint="Use --precision fp32; if it is no number there either, the weights are of no use",
        )
    return {"model": str(weights), "unigram_entropy": unigram_entropy(batches), **row}


def _is_of_a_task(config: EvaluateConfig, recipe: dict[str, Any]) -> bool:
    """Whether a task is scored, in place of denoisers; refuses keys of the other."""
    prepared = [name for name in config.data if (Path(name) / "manifest.json").is_file()]
    task = config.task or (None if prepared else recipe.get("task"))
    if prepared and config.task:
        raise ConfigurationError(
            f"task is {task}, and {prepared[0]} was made by `fat5 prepare`",
            hint="Give a file of examples, or leave task out to score denoisers",
        )
    foreign = config.given(OF_DENOISERS if task else OF_TASKS)
    if foreign:
        key = next(iter(foreign))
        what, other = (f"{task} is scored", "denoisers") if task else ("denoisers are scored", "a task")
        hint = "Remove it, or give a folder made by `fat5 prepare`" if task else "Remove it, or give --task"
        raise ConfigurationError(f"is a key of {other}, and {what}", where=key, hint=hint)
    examples = [name for name in config.data if Path(name).is_file() or name.startswith(SAMPLE) or is_dataset(name)]
    if examples and not task:
        raise ConfigurationError(
            f"task is not given, and {examples[0]} was not made by `fat5 prepare`",
            hint=f"Give --task {', '.join(get_args(TaskName)[:-1])} or {get_args(TaskName)[-1]}",
        )
    return task is not None


def _sources(config: EvaluateConfig, recipe: dict[str, Any]) -> list[WeightedShards]:
    """The split (validation if none is named) of the folders that are named, or of those of the run."""
    named, weights = config.data, config.weights
    if not named:
        own = recipe.get("data", {}).get("sources", [])
        named = [source["path"] for source in own]
        weights = weights or [source.get("weight", 1.0) for source in own]
    if not named:
        raise ConfigurationError("data is not given", hint="Give a folder made by `fat5 prepare`: --data DIR")
    return open_weighted(named, weights, config.split or "validation")


def _recipe(folder: Path) -> dict[str, Any]:
    """The config.yaml of the run that a folder is, or whose model or checkpoint it is; empty for any other folder."""
    path = folder / "config.yaml"
    if not path.is_file():
        whole = folder.resolve()
        run = whole.parent if whole.name in ("model", "adapter") else whole.parent.parent
        path = run / "config.yaml"
        inside = whole.name in ("model", "adapter") or whole.parent.name == "checkpoints"
        if not (inside and path.is_file() and (run / "metrics.jsonl").is_file()):
            return {}
    recipe = read_yaml(path, path)
    if "task" in recipe:
        return recipe
    data = recipe.get("data")
    sources = data.get("sources", []) if isinstance(data, dict) else [None]
    for source in sources if isinstance(sources, list) else [None]:
        if not isinstance(source, dict) or not isinstance(source.get("path"), str):
            raise ConfigurationError(
                "says nothing of a run's data", where=path, hint="Restore it, or give a copy of the model's folder"
            )
    return recipe


def _check_tokenizer(folder: Path, info: Any) -> None:
    if not (folder / "tokenizer.json").is_file():
        return  # a checkpoint has none; its vocabulary is checked against the data's
    own = load_tokenizer(folder).info
    if own.sha256 != info.sha256:
        raise TokenizerError(
            "the data was prepared with another tokenizer than the model's",
            where=folder,
            hint="Prepare the text again with --tokenizer set to the model's folder",
        )
