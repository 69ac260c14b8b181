"""The task of `fat5 finetune`: a T5-family model learns from examples, and is measured on others."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fat5 import model as fat5_model
from fat5.data import BatchConfig, Tokenizer, load_tokenizer
from fat5.data.examples.packing import BUDGET_MULTIPLE
from fat5.errors import ConfigurationError, TokenizerError
from fat5.files import file_sha256, write_atomically
from fat5.machine import free_memory
from fat5.model import FAT5Config, quiet
from fat5.model.card import CardFacts
from fat5.model.loading import check_finite
from fat5.tasks.finetune import adapter, predicting
from fat5.tasks.finetune.answers import Answers
from fat5.tasks.finetune.card import PIPELINES, results_section
from fat5.tasks.finetune.classes import Classification, Regression
from fat5.tasks.finetune.config import METRICS, FinetuneConfig
from fat5.tasks.finetune.examples import ExampleLoader, ExampleSet, ExampleStream
from fat5.tasks.finetune.objective import HeadObjective
from fat5.tasks.finetune.outcome import RESULTS, score, write_outcome
from fat5.tasks.finetune.table import Table, hold_out, read_table
from fat5.tasks.finetune.tags import Tagging
from fat5.tasks.finetune.text import Instructions, TextToText
from fat5.tasks.metrics import LOWER_IS_BETTER, measure
from fat5.tasks.results import aggregate
from fat5.train.checkpoint.state import RunState, unique_weights
from fat5.train.checkpoint.store import model_folder
from fat5.train.cost.memory import GIB, check_memory, plan_memory
from fat5.train.evaluation import Scorer, evaluate
from fat5.train.export import export
from fat5.train.precision import resolve_precision
from fat5.train.run import run
from fat5.train.run_directory import RunDirectory
from fat5.train.world import World

FORMS: dict[str, Any] = {
    "text-to-text": TextToText,
    "instructions": Instructions,
    "sequence-classification": Classification,
    "regression": Regression,
    "token-classification": Tagging,
    "question-answering": Answers,
}

LARGEST_PACK, LARGEST_PACK_CPU = 16_384, 4_096
"""Encoder tokens of a pack; a larger step has several."""

FEWEST_TOKENS_AN_EXAMPLE = 16
"""A pack has room for one example a this many tokens."""

TYPICAL_FILL = 0.95
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*.model", "vocab.*",
    "merges.txt",
)  # fmt: skip


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Carries out a fine-tuning run, or the rest of one, in `config.output_dir`; with `seeds` above 1 one run for each
    seed, in `seed-N`.

    Returns:
        The content of summary.json.

    Raises:
        FAT5Error: something that the user can mend; nothing half-written is left behind.
        RunStopped: a signal stopped the run after its state was saved.
    """
    world = World.here()
    if config.seeds == 1:
        return run(Finetuning.open(config, world), world)
    config.resolved()
    folder = RunDirectory(config.output_dir)
    folder.mark()
    summaries, found = [], []
    for seed in range(config.seed, config.seed + config.seeds):
        one = folder.path / f"seed-{seed}"
        own = replace(config, seed=seed, seeds=1, output_dir=str(one))
        summaries.append(run(Finetuning.open(own, world), world))
        found.append(json.loads((one / RESULTS).read_text()))
    summary = {"seeds": list(range(config.seed, config.seed + config.seeds)), "results": aggregate(found)}
    head = {key: found[0][key] for key in ("task", "model", "split", "examples")}
    content = {**head, "seeds": summary["seeds"], "metrics": summary["results"]}
    write_atomically(folder.path / RESULTS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    summary |= {"runs": summaries}
    write_atomically(folder.summary, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return summary


@dataclass
class Split:
    """The examples of one split, as rows and encoded."""

    name: str
    table: Table
    examples: ExampleSet


@dataclass
class Finetuning:
    """The task of `fat5 finetune` (`fat5.train.task.Task`)."""

    verb: ClassVar[str] = "finetune"
    part: ClassVar[str] = "source"
    reference: ClassVar[None] = None

    config: FinetuneConfig
    form: Any
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
        data = config.data
        table = read_table(data.train, "train", data.subset, data.max_examples)
        if data.validation:
            held = read_table(data.validation, "validation", data.subset, data.max_examples)
        else:
            table, held = hold_out(table, form.keys(table), data.validation_fraction)
        form.learn(table)
        train, validation = (
            Split(name, rows, form.encode(rows)) for name, rows in (("train", table), ("validation", held))
        )
        test = None
        if data.test:
            rows = read_table(data.test, "test", data.subset, data.max_examples)
            test = Split("test", rows, form.encode(rows))
        config, batch = choose_sizes(config, form, train, validation, world.device)
        model_config = _model_config(config, form, base, tokenizer, where)
        stream = ExampleStream(train.examples, config.seed, tokenizer.info.pad_id, train.table.sha256())
        workers = int(config.data.num_workers)
        loader = ExampleLoader(stream, batch, rank=world.rank, world_size=world.size, num_workers=workers)
        return cls(config, form, tokenizer, where, model_config, batch, loader, train, validation, test)

    def announce(self, device: torch.device) -> list[str]:
        """Task, examples, steps, memory; refuses a run that the memory cannot hold."""
        config, batch = self.config, self.batch
        with torch.device("meta"), quiet():
            model = self._model_class()(self.model_config)
        plan, free = plan_memory(config, batch, model, device), free_memory(device)
        check_memory(plan, free)
        counts = [f"{len(split.table):,} {split.name}" for split in self._splits()]
        cut = sum(split.examples.cut for split in self._splits())
        what = f"{len(self.form.label_names):,} labels" if self.form.label_names else self.form.kind
        packs = f"{batch.packs_per_step} pack{'s' * (batch.packs_per_step > 1)} of {batch.encoder_tokens:,} tokens"
        lines = [
            f"model   {config.model}, {model.num_parameters():,} parameters"
            + (f", adapters of rank {config.lora.rank} train" if config.lora.rank else ""),
            f"task    {config.task} ({what}): {', '.join(counts)} examples",
            f"step    about {self._examples_a_step():.0f} examples: {packs}; {config.optimizer.name} at "
            f"{config.optimizer.lr:g}",
            f"run     {config.steps:,} steps, {self._examples_a_step() * config.steps / len(self.train.examples):.2g} "
            f"passes; the best {config.metric} is kept",
            f"memory  about {plan.describe()}" + (f" of {free / GIB:.1f} GiB free" if free is not None else ""),
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
                model = cls.from_pretrained(folder, config=self.model_config, dtype=torch.float32)
                check_finite(model, folder)
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
        plain["model"] = "none" if base is None else file_sha256(base / "config.json")
        return plain | {"tokenizer": self.tokenizer.info.sha256, "labels": self.form.label_names}

    def evaluate(self, scorer: Scorer) -> dict[str, Any]:
        """Loss and accuracy of the validation targets, and the task's metrics (of texts only if `metric` is one)."""
        split, names = self.validation, self.validation.table.files
        batches = split.examples.batches(self.batch, self.tokenizer.info.pad_id, scorer.world.rank, scorer.world.size)
        row = evaluate(scorer, ((batch, batch.denoiser) for batch in batches), names, self.part)
        if self.form.kind == "text" and self.config.metric == "loss":
            return row
        most = self.config.eval_examples if self.form.kind == "text" else None
        predictions = self.predict(scorer, split, most=most)
        return row | score(self.config, self.form, split.table, predictions)

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
        file = predicting.PredictionFile(partial, f"{split.table.sha256()} {_weights_sha256(scorer.model)}")
        predictions = self.predict(scorer, split, file=file)
        found = write_outcome(run.path, self.config, self.form, split.name, split.table, predictions)
        partial.unlink(missing_ok=True)
        return {"results": {name: value["value"] for name, value in found["metrics"].items()}}

    def export(self, model: Any, run: RunDirectory, summary: dict[str, Any]) -> None:
        """Writes model/, and adapter/ if adapters were trained."""
        if adapter.is_adapted(model):
            base = base_and_tokenizer(self.config)[0]
            adapter.write_adapter(model, run.path / "adapter", str(base.absolute() if base else "none"))
        plain, split = adapter.merged(model), self.test or self.validation
        plain.config.label_smoothing = self.model_config.label_smoothing
        plot = run.plot if run.plot.is_file() else None
        facts = CardFacts(
            name=Path(self.config.output_dir).absolute().name,
            kind=self.form.model,
            config=plain.config,
            parameters=plain.num_parameters(),
            training=results_section(self.config, summary, run.path, plot is not None),
            languages=self.config.languages,
            pipeline=PIPELINES[self.config.task],
            examples=[self.form.inputs(split.table.select([0]))[0]],
        )
        with tempfile.TemporaryDirectory() as place:
            copy_tokenizer(self.tokenizer, self.tokenizer_folder, Path(place))
            export(plain, Path(place), run.model, facts, plot)

    def predict(
        self,
        scorer: Scorer,
        split: Split,
        *,
        most: int | None = None,
        file: predicting.PredictionFile | None = None,
    ) -> list[predicting.Prediction]:
        """What the model says of a split's rows, in their order.

        Args:
            most: take at most this many rows, the first ones.
            file: keeps predictions as they come, and has those of an earlier attempt.
        """
        return predict(self.config, self.form, self.tokenizer, self.batch, scorer, split, most=most, file=file)

    def _model_class(self) -> Any:
        return getattr(fat5_model, f"FAT5{self.form.model}")

    def _splits(self) -> list[Split]:
        return [split for split in (self.train, self.validation, self.test) if split is not None]

    def _examples_a_step(self) -> float:
        return examples_a_step(self.batch, self.train.examples)


def predict(
    config: FinetuneConfig,
    form: Any,
    tokenizer: Tokenizer,
    batch: BatchConfig,
    scorer: Scorer,
    split: Split,
    *,
    most: int | None = None,
    file: predicting.PredictionFile | None = None,
) -> list[predicting.Prediction]:
    """As `Finetuning.predict`, for any model."""
    model, examples = scorer.model, split.examples
    training = model.training
    model.eval()
    try:
        if form.kind != "text":
            contexts = split.table.texts(config.data.columns.context) if form.kind == "answers" else None
            pad = tokenizer.info.pad_id
            found = [
                one for some in predicting.read_logits(scorer, examples, batch, pad, form, contexts) for one in some
            ]
            lengths = [len(tags) for tags in form.references(split.table)] if form.kind == "entities" else []
            return sorted(predicting.of_rows(found, examples, form, lengths), key=lambda one: one[0])
        total = len(examples) if most is None else min(most, len(examples))
        rows = np.arange(total) if file is None else file.rest(total)
        plain = replace(scorer, model=adapter.merged(model).eval())
        made: list[predicting.Prediction] = []
        for some in predicting.write_texts(
            plain, examples, tokenizer, rows=rows, batch_size=config.predict_batch, num_beams=config.num_beams,
            max_new_tokens=config.max_new_tokens or config.data.max_target_tokens,
        ):  # fmt: skip
            made += some
            if file is not None:
                file.add(some)
        return sorted(made if file is None else file.found.values(), key=lambda one: one[0])
    finally:
        model.train(training)


def base_and_tokenizer(config: FinetuneConfig) -> tuple[Path | None, Path]:
    """The folder of the weights (None for random ones) and that of the tokenizer.

    Raises:
        CheckpointError: no such model. TokenizerError: no tokenizer with it.
    """
    base = None if config.model == "none" else model_folder(Path(config.model))
    if config.tokenizer is not None:
        return base, Path(config.tokenizer)
    assert base is not None, "resolved() asks for a tokenizer"
    near = [base, base.parent.parent / "model"]  # a checkpoint has none, the run's model has
    for folder in near:
        if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model")):
            return base, folder
    raise TokenizerError("holds no tokenizer", where=base, hint="Give its folder: --tokenizer DIR")


def copy_tokenizer(tokenizer: Tokenizer, source: Path, target: Path) -> None:
    """Copies a tokenizer's files alone from a folder that may hold a model too; saves one that came from the hub."""
    found = [file for pattern in TOKENIZER_FILES for file in sorted(source.glob(pattern))] if source.is_dir() else []
    if not any(file.name == "tokenizer.json" for file in found):
        tokenizer.save(target)
    for file in found:
        shutil.copyfile(file, target / file.name)


def choose_sizes(
    config: FinetuneConfig, form: Any, train: Split, validation: Split, device: torch.device
) -> tuple[FinetuneConfig, BatchConfig]:
    """The configuration without `auto`, and the shapes of a batch."""
    data, gpu = config.data, device.type == "cuda"
    lengths = train.examples.input_lengths
    longest = int(max(lengths.max(), validation.examples.input_lengths.max()))
    wanted = data.batch_size * float(lengths.mean()) / TYPICAL_FILL
    encoder = data.encoder_tokens
    if encoder == "auto":
        encoder = rounded(max(longest, min(wanted, LARGEST_PACK if gpu else LARGEST_PACK_CPU)))
    elif encoder % BUDGET_MULTIPLE:
        raise ConfigurationError(
            f"must be a multiple of {BUDGET_MULTIPLE}, not {encoder}", where="data.encoder_tokens",
            hint=f"Try {rounded(encoder)}",
        )  # fmt: skip
    packs = max(1, round(wanted / encoder))
    batch = batch_config(form, train.examples, validation.examples, encoder, packs)
    a_step = examples_a_step(batch, train.examples)
    steps = config.steps
    if steps == "auto":
        steps = max(1, round(config.epochs * len(lengths) / a_step))
    every = config.eval_every
    if every == "auto":
        every = max(1, min(steps, round(len(lengths) / a_step)))
    save = every if config.save_every == "auto" else config.save_every
    workers = (2 if gpu else 0) if data.num_workers == "auto" else data.num_workers
    data = replace(data, encoder_tokens=encoder, num_workers=workers)
    config = replace(config, data=data, steps=steps, eval_every=every, save_every=save)
    return replace(config, schedule=config.schedule.resolved(steps)), batch


def batch_config(form: Any, train: ExampleSet, other: ExampleSet, encoder: int, packs: int) -> BatchConfig:
    """Shapes for a form's examples: the decoder's room goes with the encoder's in the ratio of the mean lengths."""
    most = max(8, encoder // FEWEST_TOKENS_AN_EXAMPLE)
    if form.kind == "entities":
        decoder = encoder
    elif form.kind == "text":
        longest = int(max(train.target_lengths.max(), other.target_lengths.max()))
        ratio = float(train.target_lengths.mean() / train.input_lengths.mean())
        decoder = rounded(max(longest, 1.05 * ratio * encoder))
    else:
        decoder = rounded(most * (2 if form.kind == "answers" else 1))
    return BatchConfig(
        max_tokens=encoder, encoder_tokens=encoder, decoder_tokens=decoder, packs_per_step=packs, max_examples=most
    )


def examples_a_step(batch: BatchConfig, examples: ExampleSet) -> float:
    """Examples that a step takes in, on average."""
    room = min(
        batch.encoder_tokens / examples.input_lengths.mean(), batch.decoder_tokens / examples.target_lengths.mean()
    )
    return float(min(TYPICAL_FILL * room, batch.examples_per_pack, len(examples)) * batch.packs_per_step)


def rounded(tokens: float) -> int:
    """The next multiple of 128."""
    return -(-int(np.ceil(tokens)) // BUDGET_MULTIPLE) * BUDGET_MULTIPLE


def _model_config(
    config: FinetuneConfig, form: Any, base: Path | None, tokenizer: Tokenizer, where: Path
) -> FAT5Config:
    """The configuration of the model that is trained, with its labels."""
    info = tokenizer.info
    if base is not None or (where / "config.json").is_file():
        with quiet():
            found = FAT5Config.from_pretrained(base or where)
    else:
        found = FAT5Config.preset(
            config.preset, vocab_size=info.vocab_size, pad_token_id=info.pad_id, eos_token_id=info.eos_id,
            decoder_start_token_id=info.pad_id,
        )  # fmt: skip
    if tokenizer.own_size > found.vocab_size:
        raise TokenizerError(
            f"it has {tokenizer.own_size:,} tokens, and the model {found.vocab_size:,} rows for them", where=where,
            hint="Give the model's own tokenizer",
        )  # fmt: skip
    if form.label_names is not None:
        found.id2label = dict(enumerate(form.label_names))
        found.label2id = {name: index for index, name in enumerate(form.label_names)}
    elif form.kind in ("regression", "answers"):
        found.num_labels = 1 if form.kind == "regression" else 2
    if form.kind in ("classification", "regression"):
        found.problem_type = "regression" if form.kind == "regression" else "single_label_classification"
    found.head_form = None if form.kind in ("text", "entities") else config.head
    if config.dropout is not None:
        found.dropout_rate = found.classifier_dropout = config.dropout
    return found


def _weights_sha256(model: Any) -> str:
    """A hash of all weights."""
    digest = hashlib.sha256()
    for _, weight in unique_weights(model):
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
