"""What a fine-tuned model says and scores on a split: predictions.jsonl, results.json, their drawings, and the section
of the model's card."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fat5.files import whole_file, write_atomically
from fat5.model.card import PLOT, counted
from fat5.tasks import results
from fat5.tasks.finetune.config import METRICS, FinetuneConfig
from fat5.tasks.finetune.predicting import Prediction
from fat5.tasks.finetune.splits import Split
from fat5.tasks.finetune.table import Table
from fat5.tasks.metrics import measure, measure_with_intervals
from fat5.tasks.metrics.labels import confusion, measure_by_class
from fat5.train.run_directory import RunDirectory

PREDICTIONS, RESULTS, CONFUSION, CLASSES = "predictions.jsonl", "results.json", "confusion.png", "classes.png"
MOST_DRAWN_CLASSES = 200


def score(config: FinetuneConfig, form: Any, table: Table, predictions: Sequence[Prediction]) -> dict[str, float]:
    """The task's metrics of predictions for some rows of a table."""
    references = form.references(table)
    chosen = [references[row] for row, _, _ in predictions]
    values = [value for _, value, _ in predictions]
    return measure(form.kind, values, chosen, METRICS[config.task], articles=articles(config))


def articles(config: FinetuneConfig) -> str | None:
    """The language whose articles do not count in answers: the first of the configuration, else English."""
    language = (config.languages or ["en"])[0]
    return language if language in ("en", "fr") else None


def prediction_lines(form: Any, table: Table, predictions: Sequence[Prediction]) -> Iterator[str]:
    """A JSON line for each row: input, target, prediction, and the score if there is one."""
    inputs, references = form.inputs(table), form.references(table)
    for row, value, number in predictions:
        line = {"input": inputs[row], "target": references[row], "prediction": value}
        if number is not None:
            line["score"] = number
        yield json.dumps(line, ensure_ascii=False) + "\n"


def outcome(config: FinetuneConfig, form: Any, split: Split, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The content of results.json: metrics with their intervals, and by class where there are classes."""
    references = form.references(split.table)
    values = [value for _, value, _ in predictions]
    more: dict[str, Any] = {"examples_cut": split.examples.cut, "metric": config.metric}
    if form.kind in ("classification", "entities"):
        more["by_class"] = measure_by_class(form.kind, values, references)
    if form.kind == "classification" and len(form.label_names) <= MOST_DRAWN_CLASSES:
        more["labels"] = form.label_names
        more["confusion"] = confusion(values, references, form.label_names).tolist()
    found = measure_with_intervals(form.kind, values, references, METRICS[config.task], articles=articles(config))
    return results.results_of(
        found, examples=len(split.table), split=split.name, model=config.model, task=config.task, **more
    )


def write_outcome(
    folder: Path, config: FinetuneConfig, form: Any, split: Split, predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """Writes predictions.jsonl, results.json (which is returned) and, for classes, confusion.png and classes.png."""
    with whole_file(folder / PREDICTIONS) as file:
        for line in prediction_lines(form, split.table, predictions):
            file.write(line.encode())
    content = outcome(config, form, split, predictions)
    if content.get("by_class"):
        results.draw_classes(content["by_class"], folder / CLASSES)
    if "confusion" in content:
        results.draw_confusion(content["labels"], content["confusion"], folder / CONFUSION)
    write_atomically(folder / RESULTS, results.results_text(content))
    return content


def results_section(config: FinetuneConfig, summary: dict[str, Any], run: RunDirectory) -> str:
    """Task, training, results with their intervals, and the plots, in Markdown."""
    optimizer, examples = config.optimizer, summary["examples"]
    counts = ", ".join(f"{count:,} {name}" for name, count in examples.items())
    how = f"adapters of rank {config.lora.rank}" if config.lora.rank else "all weights"
    base = "random weights" if config.model == "none" else f"`{Path(config.model).name}`"
    lines = [
        "## Fine-tuning",
        f"Fine-tuned from {base} on `{config.task}` by `fat5 finetune` ({how}): {counts} examples, "
        f"{counted(summary['steps'], 'step')} of about {counted(config.data.batch_size, 'example')}, "
        f"{optimizer.name} at {optimizer.lr:g}, "
        f"seed {config.seed}, {counted(summary['seconds'], 'second')} on {summary['device']} ({summary['precision']}).",
    ]
    if config.data.prefix:
        lines.append(f"Each input begins with `{config.data.prefix.strip()}`.")
    if config.task == "token-classification":
        lines.append("The words of a text stand with spaces between them; the first token of a word gives its tag.")
    path = run.path / RESULTS
    if path.is_file():
        found = json.loads(path.read_text())
        lines += [
            f"## Results on the {found['split']} examples ({found['examples']:,})",
            "| metric | value | 95% interval |\n|---|---|---|\n"
            + "\n".join(
                f"| {name} | {_number(score['value'])} | {_number(score['low'])} to {_number(score['high'])} |"
                for name, score in found["metrics"].items()
            ),
        ]
    if run.plot.is_file():
        lines.append(f"![Loss, rate and throughput]({PLOT})")
    return "\n\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
