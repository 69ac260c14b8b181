"""`fat5 finetune`: fine-tune a model on a task, or continue such a run."""

import json
import sys
from pathlib import Path

from fat5.launch import is_main


def main(argv: list[str]) -> int:
    """Runs the verb, and prints the results as a table and the summary as JSON."""
    from fat5.cli.parsing import parse
    from fat5.tasks.finetune.config import FinetuneConfig

    config = FinetuneConfig(**parse(FinetuneConfig, argv, "finetune"))
    from fat5.tasks.finetune.finetuning import finetune
    from fat5.tasks.finetune.outcome import RESULTS
    from fat5.tasks.results import results_table

    summary = finetune(config)
    if is_main():
        # For a person; standard output is for programs.
        table = results_table(json.loads((Path(config.output_dir) / RESULTS).read_text()))
        print(f"\n{table}\n\nmore in {config.output_dir}", file=sys.stderr, flush=True)
        print(json.dumps(summary, indent=1, ensure_ascii=False))
    return 0
