"""`fat5 evaluate`: the scores of a model on a task, or its loss and accuracy by denoiser."""

import json
from typing import Any

from fat5.cli.parsing import parse
from fat5.errors import check_writable
from fat5.files import write_output
from fat5.tasks.config import EvaluateConfig

MOST_CLASSES = 20
"""With more classes, their scores are in the JSON alone."""


def main(argv: list[str]) -> int:
    """Prints a table; with `--output FILE` writes the same as JSON."""
    config = EvaluateConfig(**parse(EvaluateConfig, argv, "evaluate"))
    for key in ("output", "predictions"):
        if path := getattr(config, key):
            check_writable(path, key=key)
    from fat5.tasks import evaluate_model

    scores = evaluate_model(config)
    print("\n".join(_task_lines(scores) if "metrics" in scores else _denoiser_lines(scores)))
    if config.output:
        write_output(config.output, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    return 0


def _task_lines(scores: dict[str, Any]) -> list[str]:
    """Each metric with its interval, then each class."""
    cut = f", {scores['examples_cut']:,} of them cut" if scores["examples_cut"] else ""
    metrics, classes = scores["metrics"], scores.get("by_class", {})
    width = max(len(name) for name in metrics)
    lines = [f"{scores['task']}, {scores['examples']:,} examples of {scores['split']}{cut}", ""]
    lines.append(f"{'metric':{width}}     value  95% interval")
    for name, score in metrics.items():
        interval = f"{_number(score['low'])} to {_number(score['high'])}"
        lines.append(f"{name:{width}}  {_number(score['value']):>8}  {interval}")
    if 0 < len(classes) <= MOST_CLASSES:
        width = max(5, *(len(name) for name in classes))
        lines += ["", f"{'class':{width}}  precision    recall        f1   targets"]
        for name, score in classes.items():
            shares = "  ".join(f"{score[key]:8.4f}" for key in ("precision", "recall", "f1"))
            lines.append(f"{name:{width}}   {shares}  {score['support']:8,}")
    return lines


def _denoiser_lines(scores: dict[str, Any]) -> list[str]:
    """Each denoiser, and all together."""
    rows = [*scores["by_denoiser"].items(), ("all", scores)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'denoiser':{width}}      loss  accuracy      tokens"]
    for name, score in rows:
        lines.append(f"{name:{width}}  {score['loss']:8.4f}  {score['accuracy']:8.2%}  {score['tokens']:10,}")
    return [*lines, f"unigram entropy of the targets: {scores['unigram_entropy']:.4f}"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
