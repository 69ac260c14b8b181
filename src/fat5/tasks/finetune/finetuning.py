"""The task of `fat5 finetune`: a T5-family model learns from examples, and is measured on others."""

import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from fat5 import model as fat5_model
from fat5.data import BatchConfig, Tokenizer, load_tokenizer
from fat5.files import write_json
from fat5.model import FAT5Config, quiet
from fat5.model.card import CardFacts
from fat5.model.loading import check_finite
from fat5.tasks.finetune import adapter
from fat5.tasks.finetune.config import METRICS, FinetuneConfig
from fat5.tasks.finetune.examples import ExampleLoader, ExampleStream, Form
from fat5.tasks.finetune.model import base_and_tokenizer, configure_model, copy_tokenizer, widen_new_head
from fat5.tasks.finetune.objective import HeadObjective
from fat5.tasks.finetune.outcome import RESULTS, results_section, score, write_outcome
from fat5.tasks.finetune.predicting import PredictionFile, predict, prediction_key
from fat5.tasks.finetune.sizes import choose_sizes, examples_a_step
from fat5.tasks.finetune.splits import FORMS, Split, read_splits
from fat5.tasks.finetune.table import Table
from fat5.tasks.initial import fingerprint
from fat5.tasks.metrics import LOWER_IS_BETTER, measure
from fat5.tasks.results import aggregate
from fat5.train.checkpoint.state import RunState
from fat5.train.cost.memory import check_memory, plan_memory
from fat5.train.evaluation import Scorer, evaluate
from fat5.train.export import export
from fat5.train.log.display import CountDisplay
from fat5.train.precision import resolve_precision
from fat5.train.run import run
from fat5.train.run_directory import RunDirectory
from fat5.train.world import World


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Carries out a fine-tuning run, or the rest of one, in `config.output_dir`; with `seeds` above 1 one run for each
    seed, in `seed-N`.

    Returns and raises as `fat5.train.run.run`.
    """
    with World.here() as world:
        if config.seeds == 1:
            return run(Finetuning.open(config, world), world)
        return _every_seed(config, world)


def _every_seed(config: FinetuneConfig, world: World) -> dict[str, Any]:
    """A run for each seed, in `seed-N`, and their results together."""
    config.resolved()
    folder = RunDirectory(config.output_dir)
    summaries, found = [], []
    with folder if world.is_main else nullcontext():
        for seed in range(config.seed, config.seed + config.seeds):
            one = folder.path / f"seed-{seed}"
            own = replace(config, seed=seed, seeds=1, output_dir=str(one))
            summaries.append(run(Finetuning.open(own, world), world))
            found.append(json.loads((one / RESULTS).read_text()))
    summary = {"seeds": list(range(config.seed, config.seed + config.seeds)), "results": aggregate(found)}
    head = {key: found[0][key] for key in ("task", "model", "split", "examples")}
    content = {**head, "seeds": summary["seeds"], "metrics": summary["results"]}
    summary |= {"runs": summaries}
    if world.is_main:
        write_json(folder.path / RESULTS, content)
        write_json(folder.summary, summary)
    return summary


@dataclass
class Finetuning:
    """The task of `fat5 finetune` (`fat5.train.task.Task`)."""

    verb: ClassVar[str] = "finetune"
    part: ClassVar[str] = "source"
    reference: ClassVar[None] = None

    config: FinetuneConfig
    form: Form
    tokenizer: Tokenizer
    tokenizer_folder: Path
    model_config: FAT5Config
    batch: BatchConfig
    loader: ExampleLoader
    train: Split
    validation: Split
    test: Split | None

    @classmethod
    def open(cls, config: FinetuneConfig, world: World) -> "Finetuning":
        """Reads and encodes the examples; chooses the sizes that the configuration leaves open.

        Raises:
            DataError, TokenizerError, ConfigurationError, CheckpointError: from data, keys or model.
        """
        config = config.resolved()
        config = replace(config, precision=resolve_precision(config.precision, world.device))
        base, where = base_and_tokenizer(config)
        tokenizer = load_tokenizer(where)
        form = FORMS[config.task](config, tokenizer)
        measure(form.kind, [], [], METRICS[config.task])  # a missing library is refused before the training
        names = ("train", "validation", "test") if config.data.test else ("train", "validation")
        tables = read_splits(config.data, form, names)
        form.learn(tables["train"])
        train, validation, *tests = (Split(name, tables[name], form.encode(tables[name])) for name in names)
        packed = [validation] if form.kind == "text" else [validation, *tests]  # texts are written from rows
        config, batch = choose_sizes(config, form, train, packed, world)
        model = configure_model(config, form, base, tokenizer, where)
        stream = ExampleStream(train.examples, config.seed, tokenizer.info.pad_id, train.table.sha256())
        workers = int(config.data.num_workers)
        loader = ExampleLoader(stream, batch, rank=world.rank, world_size=world.size, num_workers=workers)
        return cls(config, form, tokenizer, where, model, batch, loader, train, validation, next(iter(tests), None))

    def announce(self, world: World) -> list[str]:
        """Task, examples, steps, memory; refuses a run that the memory cannot hold."""
        config, batch = self.config, self.batch
        with torch.device("meta"), quiet():
            model = self._model_class()(self.model_config)
        plan, free = plan_memory(config, batch, model, world), world.free_memory()
        check_memory(plan, free)
        counts = [f"{len(split.table):,} {split.name}" for split in self._splits()]
        cut = sum(split.examples.cut for split in self._splits())
        what = f" ({len(self.form.label_names):,} labels)" if self.form.label_names else ""
        packs = f"{batch.packs_per_step} pack{'s' * (batch.packs_per_step > 1)} of {batch.encoder_tokens:,} tokens"
        a_step = examples_a_step(batch, self.train.examples)
        lines = [
            f"model   {config.model}, {model.num_parameters():,} parameters"
            + (f", adapters of rank {config.lora.rank} train" if config.lora.rank else ""),
            f"task    {config.task}{what}: {', '.join(counts)} examples",
            f"step    about {a_step:.0f} examples: {packs}; {config.optimizer.name} at {config.optimizer.lr:g}",
            f"run     {config.steps:,} steps, {a_step * config.steps / len(self.train.examples):.2g} "
            f"passes; the best {config.metric} is kept",
            f"memory  about {plan.describe(free)}",
        ]
        if cut:
            lines.append(f"cut     {cut:,} examples were too long and lost their ends (data.max_source_tokens, …)")
        return lines

    def build_model(self) -> Any:
        """The model with its head, read from `config.model`, or with random weights; with adapters if asked for."""
        config, cls = self.config, self._model_class()
        with quiet():
            if config.model == "none":
                model = cls(self.model_config)
            else:
                folder = base_and_tokenizer(config)[0]
                # The run trains a new head, so that no warning of one is due.
                model, found = cls.from_pretrained(
                    folder, config=self.model_config, dtype=torch.float32, output_loading_info=True
                )
                check_finite(model, folder)
                widen_new_head(model, found["missing_keys"])
        return adapter.add_adapters(model, config.lora, self.form.model) if config.lora.rank else model

    def objective(self, model: Any) -> Any:
        """The model itself where it has a language-model head, else with the loss of its task."""
        if self.form.kind == "text":
            model.config.label_smoothing = self.config.label_smoothing
            return model
        return HeadObjective(model, self.form.kind, self.form.weights(self.train.table), self.config.label_smoothing)

    def title(self, model: Any) -> str:
        """Model and task."""
        return f"{Path(self.config.model).name} on {self.config.task}, {model.num_parameters() / 1e6:.3g}M parameters"

    def identity(self) -> dict[str, Any]:
        """The configuration, with model and data named by hashes instead of their paths."""
        plain: dict[str, Any] = json.loads(json.dumps(self.config.to_dict()))
        for split in ("train", "validation", "test"):
            found = getattr(self, split)
            plain["data"][split] = None if found is None else found.table.sha256()
        base = base_and_tokenizer(self.config)[0]
        plain["model"] = "none" if base is None else fingerprint(base)
        return plain | {"tokenizer": self.tokenizer.info.sha256, "labels": self.form.label_names or None}

    def evaluate(self, scorer: Scorer) -> dict[str, Any]:
        """Loss and accuracy of the validation targets, and the task's metrics (of texts only if `metric` is one).

        Predictions are those of the main process, for which the others wait.
        """
        split, names = self.validation, self.validation.table.part_names
        batches = split.examples.batches(self.batch, self.tokenizer.info.pad_id, scorer.world.rank, scorer.world.size)
        row = evaluate(scorer, ((batch, batch.denoiser) for batch in batches), names, self.part)
        if self.form.kind == "regression":
            for score_of_part in (row, *row[f"by_{self.part}"].values()):
                score_of_part["accuracy"] = None  # a number is not right or wrong
        if self.form.kind == "text" and self.config.metric == "loss":
            return row
        most = self.config.eval_examples if self.form.kind == "text" else None

        def measured(alone: Scorer) -> dict[str, Any]:
            predictions = predict(self.config, self.form, self.tokenizer, self.batch, alone, split, most=most)
            return score(self.config, self.form, split.table, predictions)

        return row | scorer.on_main(measured)

    def rank(self, scores: dict[str, Any]) -> float:
        """The number by which the best checkpoint is chosen; lower is better."""
        value = scores.get(self.config.metric)
        if value is None or value != value:
            return float("inf")
        return float(value if self.config.metric in ("loss", *LOWER_IS_BETTER) else -value)

    def summary(self, state: RunState) -> dict[str, Any]:
        """Examples of each split and how many were cut."""
        return {
            "examples": {split.name: len(split.table) for split in self._splits()},
            "examples_cut": sum(split.examples.cut for split in self._splits()),
            "best_step": state.best_step,
            "stopped_early": state.stopped_early,
        }

    def finish(self, scorer: Scorer, run: RunDirectory, warn: Callable[[str], None]) -> dict[str, Any]:
        """Writes predictions.jsonl, results.json and their plots, for the test examples or those of validation."""
        split = self.test or self.validation
        partial = run.path / "predictions.partial.jsonl"
        config, form, tokenizer = self.config, self.form, self.tokenizer
        file = PredictionFile(partial, prediction_key(config, split, scorer.model, tokenizer, scorer.precision))
        with CountDisplay(f"{split.name} examples") as display:
            predictions = predict(config, form, tokenizer, self.batch, scorer, split, file=file, show=display.show)
        found = write_outcome(run.path, config, form, split, predictions)
        partial.unlink(missing_ok=True)
        return {"results": {name: value["value"] for name, value in found["metrics"].items()}}

    def export(self, model: Any, run: RunDirectory, summary: dict[str, Any]) -> None:
        """Writes model/, and adapter/ if adapters were trained."""
        if adapter.is_adapted(model):
            base = base_and_tokenizer(self.config)[0]
            adapter.write_adapter(model, run.path / "adapter", str(base.absolute() if base else "none"))
        plain, split = adapter.merged(model), self.test or self.validation
        plain.config.label_smoothing = self.model_config.label_smoothing
        if self.form.model == "ForConditionalGeneration":
            # `fat5 generate` and transformers' pipelines put it before a text.
            plain.config.prefix = self.config.data.prefix
        facts = CardFacts(
            name=Path(self.config.output_dir).absolute().name,
            kind=self.form.model,
            config=plain.config,
            parameters=plain.num_parameters(),
            training=results_section(self.config, summary, run),
            languages=self.config.languages,
            pipeline=self.form.pipeline,
            examples=[self._widget(split.table.select([0]))],
        )
        with tempfile.TemporaryDirectory() as place:
            copy_tokenizer(self.tokenizer, self.tokenizer_folder, Path(place))
            export(plain, Path(place), run, facts)

    def _widget(self, row: Table) -> dict[str, str]:
        """A row as the hub's widget of the task takes it."""
        example: dict[str, str] = {"text": self.form.inputs(row)[0]}
        if self.form.kind == "answers":
            example["context"] = row.texts(self.config.data.columns.context)[0]
        return example

    def _model_class(self) -> Any:
        return getattr(fat5_model, f"FAT5{self.form.model}")

    def _splits(self) -> list[Split]:
        return [split for split in (self.train, self.validation, self.test) if split is not None]
