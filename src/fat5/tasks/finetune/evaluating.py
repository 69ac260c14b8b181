"""`fat5 evaluate` for a task: any model of the T5 family on any examples, with the results of a fine-tuning run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import torch

from fat5 import model as fat5_model
from fat5.data import load_tokenizer
from fat5.data.examples.config import rounded_up
from fat5.data.text.corpus import is_dataset
from fat5.errors import CheckpointError, ConfigurationError, TokenizerError, check_whole
from fat5.files import write_output
from fat5.model import FAT5Config, load_model, quiet
from fat5.model.loading import check_finite
from fat5.tasks.config import EvaluateConfig
from fat5.tasks.finetune import adapter
from fat5.tasks.finetune.config import METRICS, Columns, FinetuneConfig
from fat5.tasks.finetune.examples import ExampleSet
from fat5.tasks.finetune.model import base_and_tokenizer
from fat5.tasks.finetune.objective import HeadObjective
from fat5.tasks.finetune.outcome import outcome, prediction_lines
from fat5.tasks.finetune.predicting import Prediction, PredictionFile, predict, prediction_key
from fat5.tasks.finetune.sizes import LARGEST_PACK, LARGEST_PACK_CPU, batch_config
from fat5.tasks.finetune.splits import FORMS, Split, read_splits
from fat5.tasks.finetune.table import Table, read_table
from fat5.tasks.metrics import measure
from fat5.train.checkpoint.files import MANIFEST
from fat5.train.checkpoint.store import model_folder
from fat5.train.config import LARGEST_COUNT
from fat5.train.evaluation import Scorer
from fat5.train.log.display import CountDisplay
from fat5.train.precision import Precision, resolve_precision
from fat5.train.world import World, training_device

OF_DATA = ("prefix", "subset", "max_source_tokens", "max_target_tokens", "too_long", "stride", "encoder_tokens")
"""Keys that `fat5 finetune` has under data."""

OF_RUN = ("languages", "num_beams", "max_new_tokens", "predict_batch", "precision")

SPLITS = ("train", "validation", "test")


def evaluate_task(config: EvaluateConfig, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Scores a model on a task's examples; with `predictions` writes them to that file.

    Args:
        config: its folder exists.
        recipe: the config.yaml of the run that the folder belongs to; empty for any other folder.

    Returns:
        The content of results.json, with the folder of the weights as model.

    Raises:
        ConfigurationError, DataError, TokenizerError: keys, examples or a tokenizer that do not go together.
        CheckpointError: no model there, a damaged one, or one without the task's head.
    """
    run = read_run(recipe, config.model) if "task" in recipe else None
    settings = _settings(config, run, recipe)
    device = training_device()
    precision = Precision(resolve_precision(settings.precision, device), device)
    weights, model_config = _find(settings, run)
    tokenizer_folder = _tokenizer_folder(settings, run, weights)
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.check_rows(model_config.vocab_size, tokenizer_folder)
    form = FORMS[settings.task](settings, tokenizer)
    _check_head(model_config, form, settings.task, weights)
    measure(form.kind, [], [], METRICS[settings.task])  # a missing library is refused before the work
    name, table = _read(config, settings, run, form)
    model = _load(form, weights, model_config, precision)
    _learn(form, table, model_config, weights)
    split = Split(name, table, form.encode(table))
    forward = model if form.kind == "text" else HeadObjective(model, form.kind)
    scorer = Scorer(model, precision, World(device), forward)
    batch = batch_config(form, split.examples, [], _room(settings, split.examples, device), 1)
    file = None
    given = Path(config.predictions) if config.predictions and form.kind == "text" else None
    if given is not None and (given.is_file() or not given.exists()):  # nothing is kept beside a device or a pipe
        file = PredictionFile(
            Path(f"{config.predictions}.partial"), prediction_key(settings, split, model, tokenizer, precision)
        )
    with CountDisplay("examples") as display:
        found = predict(settings, form, tokenizer, batch, scorer, split, file=file, show=display.show)
    _check_numbers(found, precision, weights)
    content = outcome(replace(settings, model=str(weights)), form, split, found)
    if config.predictions:
        write_output(config.predictions, "".join(prediction_lines(form, table, found)))
        if file is not None:
            file.path.unlink(missing_ok=True)
    return content


def read_run(recipe: Mapping[str, Any], where: object) -> FinetuneConfig:
    """The configuration of a fine-tuning run, from the keys of its config.yaml.

    Raises:
        ConfigurationError: they are not those of one.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FinetuneConfig)
    try:
        return FinetuneConfig(**parser.instantiate_classes(parser.parse_object(dict(recipe))))
    except (ArgumentError, ValueError, TypeError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"its config.yaml is not that of a fine-tuning run ({said})", where=where,
            hint="Restore it, or give a copy of the model's folder",
        ) from error  # fmt: skip


def _settings(config: EvaluateConfig, run: FinetuneConfig | None, recipe: Mapping[str, Any]) -> FinetuneConfig:
    """The run's configuration with the keys that are given; the defaults where there is no run."""
    known = {item.name: type(None) in get_args(item.type) for item in fields(Columns)}
    columns: dict[str, Any] = dict(config.columns)
    for name, column in columns.items():
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}"
            raise ConfigurationError(f"there is no column {name!r}", where="columns", hint=hint)
        if column is None and not known[name]:
            raise ConfigurationError("null is no value here", where=f"columns.{name}", hint="Name the column")
    base = run or FinetuneConfig(output_dir="", precision=recipe.get("precision", "auto"))
    data = replace(base.data, columns=replace(base.data.columns, **columns), **config.given(OF_DATA))
    task = config.task or base.task
    metric = base.metric if task == base.task else "loss"
    changes = config.given(OF_RUN) | {"task": task, "metric": metric, "tokenizer": config.tokenizer}
    settings = replace(base, model=config.model, data=data, **changes)
    settings.check_reading("")
    if config.max_examples is not None:
        check_whole(config.max_examples, "max_examples", most=LARGEST_COUNT)
    return settings


def _find(settings: FinetuneConfig, run: FinetuneConfig | None) -> tuple[Path, FAT5Config]:
    """The folder of the weights, or of an adapter, and the model's configuration."""
    folder = Path(settings.model)
    if (folder / adapter.ADAPTER).is_file():
        beside = folder.absolute().parent / "model"
        labelled = beside if run is not None and (beside / "config.json").is_file() else None
        if labelled is None and FORMS[settings.task].model != "ForConditionalGeneration":
            raise CheckpointError(
                "an adapter alone does not say its labels", where=folder,
                hint="Give adapter/ in its run, or the run's model/",
            )  # fmt: skip
        source = labelled or adapter.base_folder(folder)
    else:
        source = folder = model_folder(folder)
        if run is not None and run.lora.rank and (folder / MANIFEST).is_file():
            raise CheckpointError(
                "is a checkpoint of adapters, which needs its run", where=folder,
                hint="Let the run finish, and give its model/ or adapter/",
            )  # fmt: skip
    with quiet():
        return folder, FAT5Config.from_pretrained(source)


def _tokenizer_folder(settings: FinetuneConfig, run: FinetuneConfig | None, weights: Path) -> Path:
    """The tokenizer that is given, the model's own, or that of the run's base."""
    try:
        if not (weights / adapter.ADAPTER).is_file():
            return base_and_tokenizer(settings)[1]
        beside = weights.absolute().parent / "model"
        near = beside if run is not None and beside.is_dir() else adapter.base_folder(weights)
        return base_and_tokenizer(replace(settings, model=str(near)))[1]
    except TokenizerError:
        if run is None:
            raise
        return base_and_tokenizer(run)[1]


def _check_head(config: FAT5Config, form: Any, task: str, where: Path) -> None:
    """Raises CheckpointError unless a model has the head that a task needs."""
    wanted, labels = form.model, config.num_labels
    named = [name.replace("WithLMHeadModel", "ForConditionalGeneration") for name in config.architectures or []]
    several = config.problem_type == "multi_label_classification"
    why = None
    if (where / adapter.ADAPTER).is_file():
        return  # named by its own file
    if named and not named[0].endswith(wanted):
        why = f"is a {named[0]}, and {task} needs one {wanted}"
    elif form.kind == "regression" and labels != 1:
        why = f"predicts {labels:,} classes, and regression needs one number"
    elif form.kind == "classification" and (labels == 1 or several):
        why = f"predicts {'several labels of a text' if several else 'a number'}, and {task} needs one class"
    if why:
        raise CheckpointError(why, where=where, hint=f"Train it first: `fat5 finetune --task {task}`, or mend --task")


def _read(config: EvaluateConfig, settings: FinetuneConfig, run: FinetuneConfig | None, form: Any) -> tuple[str, Table]:
    """The name and the rows of what is scored."""
    if config.data:
        if config.split and not any(is_dataset(name) for name in config.data):
            raise ConfigurationError(
                f"split is {config.split}, and a file is read whole", hint="Remove it, or give hf:NAME as data"
            )
        split = config.split or "test"
        table = read_table(config.data, split, settings.data.subset, config.max_examples)
        return ", ".join(f"{name} ({split})" if is_dataset(name) else name for name in config.data), table
    if run is None:
        raise ConfigurationError("data is not given", hint="Give the examples: --data FILE")
    split = config.split or ("test" if settings.data.test else "validation")
    if split not in SPLITS or (split == "test" and not settings.data.test):
        has = "train, validation" + ", test" * bool(settings.data.test)
        raise ConfigurationError(f"split is {split}, and the run has {has}", hint="Choose one of them, or give --data")
    table = read_splits(settings.data, form, (split,))[split]
    return split, table.select(range(min(len(table), config.max_examples or len(table))))


def _learn(form: Any, table: Table, config: FAT5Config, where: Path) -> None:
    """What a form learns in training, from the model's configuration."""
    if form.kind in ("classification", "entities"):
        names = dict(config.id2label)
        if sorted(names) != list(range(len(names))):
            raise CheckpointError("id2label does not number the labels from 0", where=where / "config.json")
        form.label_names = [names[index] for index in range(len(names))]
        if form.label_names == [f"LABEL_{index}" for index in range(len(names))]:
            # The names that transformers gives to labels without one; the file may have their numbers.
            rows = form.references(table)
            found = set(rows) if form.kind == "classification" else {tag for tags in rows for tag in tags}
            if not found & set(form.label_names):
                form.label_names = [str(index) for index in range(len(names))]
    elif form.kind == "answers":
        told = (getattr(config, "task_specific_params", None) or {}).get("question-answering", {})
        if "handle_impossible_answer" in told:
            form.may_be_missing = bool(told["handle_impossible_answer"])
        else:
            form.learn(table)


def _load(form: Any, weights: Path, config: FAT5Config, precision: Precision) -> Any:
    """The model in evaluation mode, on the device; refuses one whose head would be new."""
    cls = getattr(fat5_model, f"FAT5{form.model}")
    if (weights / adapter.ADAPTER).is_file():
        model = adapter.load_adapted(cls, config, weights, form.model).to(precision.weight_dtype)
        return model.to(precision.device).eval()
    if form.kind == "text":
        return load_model(weights, device=precision.device, dtype=precision.weight_dtype)
    with quiet():
        model, info = cls.from_pretrained(weights, dtype=precision.weight_dtype, output_loading_info=True)
    new = sorted(name for name in info["missing_keys"] if name.startswith(cls._head_weights))
    if new:
        hint = "Train it first: `fat5 finetune`"
        raise CheckpointError(f"has no {new[0]}, the head of a model {form.model}", where=weights, hint=hint)
    check_finite(model, weights)
    return model.to(precision.device).eval()


def _room(settings: FinetuneConfig, examples: ExampleSet, device: torch.device) -> int:
    """Encoder tokens of a pack: the run's, or as many as serve, and no fewer than the longest example has."""
    given = settings.data.encoder_tokens
    largest = LARGEST_PACK if device.type == "cuda" else LARGEST_PACK_CPU
    wanted = min(largest, int(examples.input_lengths.sum())) if given == "auto" else given
    return rounded_up(max(wanted, int(examples.input_lengths.max())))


def _check_numbers(found: Sequence[Prediction], precision: Precision, where: Path) -> None:
    """Raises CheckpointError for predictions from logits that are no numbers."""
    for _, value, number in found:
        for one in (value, number):
            if isinstance(one, float) and not math.isfinite(one):
                raise CheckpointError(
                    f"its logits on these examples are {one} in {precision.name}", where=where,
                    hint="Use --precision fp32; if they are no numbers there either, the weights are of no use",
                )  # fmt: skip
