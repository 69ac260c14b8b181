"""Leading words of a command line as the `inputs` key: `fat5 prepare a.txt b.txt --output_dir d`."""

import json
from itertools import takewhile


def with_inputs(argv: list[str]) -> list[str]:
    """`argv` with the words before its first flag given as `--inputs`; a recipe may name inputs instead."""
    inputs = list(takewhile(lambda word: not word.startswith("-"), argv))
    rest = argv[len(inputs) :]
    return [*rest, "--inputs", json.dumps(inputs)] if inputs else rest
