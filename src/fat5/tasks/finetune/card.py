"""The section of a fine-tuned model's card: task, data, results."""

import json
from pathlib import Path
from typing import Any

from fat5.model.card import PLOT, counted
from fat5.tasks.finetune.config import FinetuneConfig

PIPELINES = {
    "text-to-text": "text2text-generation",
    "instructions": "text2text-generation",
    "sequence-classification": "text-classification",
    "regression": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
}
"""Task → the hub's name for it, by which it chooses the widget."""


def results_section(config: FinetuneConfig, summary: dict[str, Any], run: Path, plot: bool) -> str:
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
    path = run / "results.json"
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
    if plot:
        lines.append(f"![Loss, rate and throughput]({PLOT})")
    return "\n\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
