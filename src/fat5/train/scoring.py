"""`evaluate_model(config)`: loss and accuracy of a finished model, by denoiser, on prepared data."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fat5.data import BatchConfig, MixtureOfDenoisers, Source, load_tokenizer, open_shards, validation_batches
from fat5.errors import CheckpointError, ConfigurationError, TokenizerError
from fat5.model import load_model
from fat5.model.weight_files import refuse_adapter
from fat5.train.checkpoint import CheckpointStore
from fat5.train.checkpoint_files import MANIFEST, verify_checkpoint
from fat5.train.config import read_config
from fat5.train.evaluation import evaluate, unigram_entropy
from fat5.train.precision import Precision, PrecisionName, resolve_precision


@dataclass
class EvaluateConfig:
    """Loss and token accuracy of a model, by denoiser, on a validation split with fixed noise."""

    model: str = ""
    """Folder of a run, of a model (config.json and model.safetensors), or of a checkpoint"""
    data: list[str] = field(default_factory=list)
    """Folders made by `fat5 prepare`; for the folder of a run, those it was trained on"""
    mixture: str | None = None
    """fat5, ul2, t5 or prefix-lm; for the folder of a run its own, else fat5"""
    eval_tokens: int = 65536
    """Validation text in raw tokens; each denoiser is applied to it"""
    max_tokens: int | None = None
    """Raw tokens of one example; for the folder of a run its own, else 1024"""
    encoder_tokens: int | None = None
    """Encoder tokens of a batch; for the folder of a run its own, else 16384"""
    decoder_tokens: int | None = None
    """Decoder tokens of a batch; for the folder of a run its own, else 8192"""
    precision: PrecisionName = "auto"
    """fp32, bf16 or fp16 (autocast), bf16-pure; auto is bf16 on a GPU that has it and fp32 on a CPU"""
    output: str | None = None
    """Write the scores to this JSON file as well"""


def evaluate_model(config: EvaluateConfig) -> dict[str, Any]:
    """Scores a model.

    Returns:
        model, loss, accuracy, tokens, unigram_entropy, and by_denoiser: name → loss, accuracy, tokens.

    Raises:
        ConfigurationError, DataError: keys or data that cannot be.
        CheckpointError: no model there, or a damaged one; pickles are refused by name.
        TokenizerError: the data was prepared with another tokenizer than the model's.
    """
    if not config.model:
        raise ConfigurationError(
            "model is not given", hint="Give the folder of a run, a model or a checkpoint: --model DIR"
        )
    folder = Path(config.model)
    if not folder.exists():
        raise CheckpointError("does not exist", where=folder, hint="Give the folder of a run, a model or a checkpoint")
    recipe = _recipe(folder)
    data = [Path(path) for path in config.data] or [Path(source["path"]) for source in recipe.get("sources", [])]
    if not data:
        raise ConfigurationError("data is not given", hint="Give a folder made by `fat5 prepare`: --data DIR")
    sources = [Source(open_shards(path, "validation")) for path in data]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = Precision(resolve_precision(config.precision, device), device)
    info = load_tokenizer(data[0] / "tokenizer").info
    mixture = MixtureOfDenoisers.of(config.mixture or recipe.get("mixture", "fat5"))
    shapes = ("max_tokens", "encoder_tokens", "decoder_tokens", "max_examples")
    chosen = {key: getattr(config, key, None) or recipe.get(key) for key in shapes}
    batch = BatchConfig(**{key: value for key, value in chosen.items() if value is not None})
    batches = list(validation_batches(sources, mixture, info, batch, eval_tokens=config.eval_tokens))
    weights = model_folder(folder)
    _check_tokenizer(weights, info)
    model = load_model(weights, device=device, dtype=precision.weight_dtype)
    if model.config.vocab_size < info.vocab_size:
        raise TokenizerError(
            f"the model has {model.config.vocab_size:,} token ids and the data {info.vocab_size:,}",
            where=weights,
            hint="Prepare the data with the model's tokenizer",
        )
    scores = evaluate(model, model, batches, mixture.names(), precision)
    row = scores.row(0)
    if not math.isfinite(row["loss"]):
        raise CheckpointError(
            f"its loss on this data is {row['loss']} in {precision.name}",
            where=weights,
            hint="Use --precision fp32; if it is no number there either, the weights are of no use",
        )
    facts = {key: row[key] for key in ("loss", "accuracy", "tokens", "by_denoiser")}
    return {"model": str(weights), "unigram_entropy": unigram_entropy(batches), **facts}


def _recipe(folder: Path) -> dict[str, Any]:
    """What a run's config.yaml says of its data; empty for any other folder."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    recipe = read_config(path).get("data")
    sources = recipe.get("sources", []) if isinstance(recipe, dict) else [None]
    for source in sources if isinstance(sources, list) else [None]:
        if not isinstance(source, dict) or not isinstance(source.get("path"), str):
            raise ConfigurationError(
                "says nothing of a run's data", where=path, hint="Restore it, or give the folder of the model itself"
            )
    return recipe  # type: ignore[return-value]


def model_folder(folder: Path) -> Path:
    """The folder with the weights: a model or checkpoint itself, a run's model/, or its newest sound checkpoint.

    Raises:
        CheckpointError: there is none, or a damaged one.
    """
    if folder.is_file():
        raise CheckpointError("is a file; a model is a folder, and pickles are never read", where=folder)
    refuse_adapter(folder)
    if (folder / MANIFEST).is_file():
        verify_checkpoint(folder)
        return folder
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    choice = CheckpointStore(folder / "checkpoints").choose()
    if choice is None:
        raise CheckpointError("holds no model and no checkpoint", where=folder, hint="Give a run or model folder")
    return choice.folder


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
