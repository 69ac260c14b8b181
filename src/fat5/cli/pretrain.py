"""`fat5 pretrain`: pretrain a model, or continue a run."""

import json
import sys

from fat5.cli.parsing import parse
from fat5.launch import is_main
from fat5.tasks.config import PretrainConfig


def main(argv: list[str]) -> int:
    """Runs the verb; returns its exit code: 128 + the signal's number where one stopped the run after a save."""
    config = PretrainConfig(**parse(PretrainConfig, argv, "pretrain"))
    from fat5.tasks import pretrain
    from fat5.train import RunStopped

    try:
        summary = pretrain(config)
    except RunStopped as stopped:
        if is_main():
            print(f"fat5 pretrain: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    if is_main():
        print(json.dumps(summary, indent=1, ensure_ascii=False))
    return 0
