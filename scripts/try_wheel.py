"""What someone does who has never seen this repository: build the wheel, install it, and run a tiny demo elsewhere.

    python scripts/try_wheel.py            about two minutes, most of them pip's

The environment is a new one in a temporary folder, with the pinned set; nothing of the checkout can be imported there.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("summary.json", "loss.png", "metrics.jsonl", "config.yaml", "checkpoints", "model/config.json")
NUMBERS = ("parameters", "seconds", "train_tokens", "tokens_per_second", "val_loss_first", "val_loss_last")
FIGURES = (*NUMBERS, "val_loss_by_denoiser", "encoder_fill", "decoder_fill", "tokens_dropped", "samples")
TINY = {
    "tokenizer.vocab_size": "1024",
    "pretrain.steps": "4",
    "pretrain.eval_tokens": "512",
    "pretrain.model.overrides": "{d_model: 64, d_ff: 128, num_layers: 2, num_decoder_layers: 2, num_heads: 2}",
}
STOCK = """
import sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("demo/model"), AutoTokenizer.from_pretrained("demo/model")
words = model.generate(**tokenizer("[R] Le noyau<extra_id_0>.", return_tensors="pt"), max_new_tokens=4)
sys.exit("fat5" in sys.modules or type(model).__name__ != "T5ForConditionalGeneration" or words.shape[0] != 1)
"""


def main() -> None:
    """Fails where any step fails, or the demo leaves less than it promises."""
    with tempfile.TemporaryDirectory(prefix="fat5-wheel-") as name:
        folder = Path(name)
        python, desk = folder / "env" / "bin" / "python", folder / "desk"
        venv.create(folder / "env", with_pip=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT])
        (wheel,) = folder.glob("fat5-*.whl")
        run([*pip, "install", "--progress-bar", "off", "--constraint", ROOT / "constraints.txt", wheel])
        run([*pip, "check"])
        # An empty folder but for what could be mistaken for the package or for the recipe.
        (desk / "fat5").mkdir(parents=True)
        (desk / "demo").mkdir()
        fat5 = folder / "env" / "bin" / "fat5"
        run([fat5, "doctor"], desk)
        flags = [word for key, value in TINY.items() for word in (f"--{key}", value)]
        run([fat5, "demo", "--output_dir", "demo", *flags], desk)
        check(desk / "demo")
        run([fat5, "generate", "--model", "demo", "--max_new_tokens", "4", "Le noyau ___ est libre."], desk)
        run([python, "-c", STOCK], desk)
    print(f"{wheel.name}: installed and run outside of the checkout")


def run(command: list[str | Path], folder: Path = ROOT) -> None:
    """Runs a command that must succeed, without the checkout on Python's path."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    print("+", *command, flush=True)
    subprocess.run(command, cwd=folder, env=environment | {"HF_HUB_OFFLINE": "1"}, check=True)


def check(demo: Path) -> None:
    """Exits where a file or figure of the contract is missing."""
    missing = [name for name in FILES if not (demo / name).exists()]
    summary = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    missing += [f"summary.json: {name}" for name in FIGURES if name not in summary]
    if missing or summary["tokens_dropped"] or not summary["samples"]:
        sys.exit(f"the demo of the wheel is not what the contract says: {', '.join(missing) or summary}")


if __name__ == "__main__":
    main()
