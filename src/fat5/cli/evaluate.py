"""`fat5 evaluate`: loss and accuracy of a model, by denoiser."""

import json

from fat5.cli.parsing import parse
from fat5.errors import check_writable
from fat5.files import write_output
from fat5.tasks.config import EvaluateConfig


def main(argv: list[str]) -> int:
    """Prints a table; with `--output FILE` writes the same as JSON."""
    config = EvaluateConfig(**parse(EvaluateConfig, argv, "evaluate"))
    if config.output:
        check_writable(config.output)
    from fat5.tasks import evaluate_model

    scores = evaluate_model(config)
    rows = [*scores["by_denoiser"].items(), ("all", scores)]
    width = max(len(name) for name, _ in rows)
    print(f"{'denoiser':{width}}      loss  accuracy      tokens")
    for name, score in rows:
        print(f"{name:{width}}  {score['loss']:8.4f}  {score['accuracy']:8.2%}  {score['tokens']:10,}")
    print(f"unigram entropy of the targets: {scores['unigram_entropy']:.4f}")
    if config.output:
        write_output(config.output, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    return 0
