"""Golden losses: 20 steps of a tiny model on the French sample, against `losses.txt`.

They hold the order of the examples, their noise, the model, the loss, the optimizer and the schedule in place. After a
change that is meant to alter them, write the file again and say why in the commit:

    PYTHONPATH=src:tests python tests/golden/test_losses.py
"""

import tempfile
from pathlib import Path

import pytest

from fat5.tasks import ModelConfig, pretrain
from fat5.train import read_rows
from made_run import TINY, prepare_sample, tiny

FILE = Path(__file__).with_name("losses.txt")
POSITIONS = ("t5", "rope")
STEPS = 20
# Relative. Processors add in another order (AVX2, AVX-512, NEON): a rounding of float32 at the first step, some more
# after twenty. A change of an example, a seed or a formula moves the losses by 1e-3 and more.
TOLERANCE = 2e-5


def losses_of(prepared: Path, folder: Path, positions: str) -> list[float]:
    """Training losses of every step, then the validation losses before the first and after the last."""
    model = ModelConfig(preset="fat5-demo", position_encoding=positions, overrides=TINY | {"dropout_rate": 0.0})
    config = tiny(prepared, folder, steps=STEPS, save_every=STEPS, eval_every=STEPS, precision="fp32", compile=False)
    config.model = model
    pretrain(config)
    rows = read_rows(folder / "metrics.jsonl")
    return [row["loss"] for kind in ("train", "eval") for row in rows if row["kind"] == kind]


def golden() -> dict[str, list[float]]:
    rows = [line.split() for line in FILE.read_text().splitlines() if not line.startswith("#")]
    return {name: [float(value) for value in values] for name, *values in rows}


@pytest.mark.parametrize("positions", POSITIONS)
def test_losses_are_the_golden_ones(prepared, tmp_path, positions):
    losses = losses_of(prepared, tmp_path / "run", positions)
    assert len(losses) == STEPS + 2
    assert losses == pytest.approx(golden()[positions], rel=TOLERANCE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_sample(Path(folder))
        rows = {name: losses_of(data, Path(folder) / name, name) for name in POSITIONS}
    text = "".join(f"{name} {' '.join(f'{loss:.7f}' for loss in losses)}\n" for name, losses in rows.items())
    FILE.write_text(f"# Positions, losses of {STEPS} steps, validation before and after (see test_losses.py)\n{text}")
