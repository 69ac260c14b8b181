"""How far is FAT5 from the stock class, family by family, check by check; and does it write the same tokens?

python benchmarks/parity.py [--families v1.0 umT5 ...]

Each model is made by the stock class with random weights, saved, and read by FAT5 from its folder; both then compute
the same in float32 on the CPU. The checks are those of the tests (tests/parity/checks.py and generation.py), which
bound what is written down here. Nothing is timed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

import measure

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "parity"))

from checks import CHECKS, ENCODER_CHECKS
from generation import MODES, agreement

from stock import ENCODERS, FAMILIES, SIZES

SIZES |= {"num_layers": 3, "num_decoder_layers": 3}  # one more than in the tests


def differences(families: list[str]) -> list[dict[str, object]]:
    """Rows of the parity table: the largest difference, relative to the largest value of what is compared."""
    found = []
    models = {**FAMILIES, **ENCODERS}
    for check in CHECKS:
        for family in families:
            checks = ENCODER_CHECKS if family in ENCODERS else CHECKS
            if check in checks:
                torch.manual_seed(0)
                value = checks[check](models[family]())
                found.append(measure.row(check, family, "largest difference", np.array([value]), "relative"))
    return found


def tokens(families: list[str]) -> list[dict[str, object]]:
    """Rows of the generation table: the share of equal tokens."""
    found = []
    for mode in MODES:
        for family in (name for name in families if name in FAMILIES):
            torch.manual_seed(0)
            equal, written = agreement(FAMILIES[family](), mode)
            found.append(measure.row(mode, family, "equal tokens", np.array([equal / written]), "share"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    every = [*FAMILIES, *ENCODERS]
    parser.add_argument("--families", nargs="+", choices=every, default=every)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    measure.save("parity", differences(arguments.families))
    measure.save("generation", tokens(arguments.families))


if __name__ == "__main__":
    main()
