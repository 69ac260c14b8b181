"""`fat5 evaluate`: the scores of a model on a task, or its loss and accuracy by denoiser."""

import json
from typing import Any

from fat5.cli.parsing import parse
from fat5.errors import check_writable
from fat5.files import write_output
from fat5.tasks.config import EvaluateConfig


def main(argv: list[str]) -> int:
    """Prints a table; with `--output FILE` writes the same as JSON."""
    config = EvaluateConfig(**parse(EvaluateConfig, argv, "evaluate"))
    for key in ("output", "predictions"):
        if path := getattr(config, key):
            check_writable(path, key=key)
    from fat5.tasks import evaluate_model
    from fat5.tasks.results import results_table

    scores = evaluate_model(config)
    print(results_table(scores) if "metrics" in scores else "\n".join(_denoiser_lines(scores)))
    if config.output:
        write_output(config.output, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    return 0


def _denoiser_lines(scores: dict[str, Any]) -> list[str]:
    """Each denoiser, and all together."""
    rows = [*scores["by_denoiser"].items(), ("all", scores)]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'denoiser':{width}}      loss  accuracy      tokens"]
    for name, score in rows:
        lines.append(f"{name:{width}}  {score['loss']:8.4f}  {score['accuracy']:8.2%}  {score['tokens']:10,}")
    return [*lines, f"unigram entropy of the targets: {scores['unigram_entropy']:.4f}"]
