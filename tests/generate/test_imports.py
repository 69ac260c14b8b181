"""`fat5 generate` loads what decoding needs, and nothing of training; its rooms can be imported first."""

import subprocess
import sys
from pathlib import Path

from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer
from fat5.model import FAT5Config, FAT5ForConditionalGeneration


def test_a_room_imported_first_completes_a_text_without_optimizer_and_trainer(tmp_path: Path) -> None:
    """Importing transformers registers our models and attention, so a room that needs it must not need itself."""
    report = train_tokenizer(
        TokenizerTraining(inputs=["sample:fr"], output_dir=str(tmp_path), vocab_size=1024, rows=200)
    )
    config = FAT5Config.preset("fat5-demo", vocab_size=report["vocab_size"], num_layers=1, num_decoder_layers=1)
    FAT5ForConditionalGeneration(config).save_pretrained(tmp_path)
    words = ["generate", "--model", str(tmp_path), "--max_new_tokens", "3", "Le ___ libre."]
    code = f"""
import importlib, os, sys
import scipy.optimize, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor  # most of the seconds
for name in ("fat5.generate.replay", "fat5.stock", "fat5.generate.decoding"):
    if not os.fork():
        importlib.import_module(name)
        if name == "fat5.generate.decoding":
            from fat5.cli.main import main
            assert main({words!r}) == 0
            print(*sorted(name for name in sys.modules if name.startswith("fat5")), file=sys.stderr)
        sys.exit()
    assert os.wait()[1] == 0, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stderr.split()
    assert "fat5.generate.decoding" in loaded
    assert not [name for name in loaded if name.startswith(("fat5.optim", "fat5.train.trainer", "fat5.data.examples"))]
