"""`fat5 pretrain`: pretrain a model, or continue a run."""

import json

from fat5.cli.parsing import parse
from fat5.launch import is_main
from fat5.tasks.config import PretrainConfig


def main(argv: list[str]) -> int:
    """Runs the verb, and prints the summary as JSON."""
    config = PretrainConfig(**parse(PretrainConfig, argv, "pretrain"))
    from fat5.tasks import pretrain

    summary = pretrain(config)
    if is_main():
        print(json.dumps(summary, indent=1, ensure_ascii=False))
    return 0
