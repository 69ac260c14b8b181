"""The transcript of scripts/without_fat5.py, in this environment with fat5 made unimportable."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from fat5.model import FAT5Config, FAT5ForConditionalGeneration

SCRIPT = Path(__file__).parents[2] / "scripts" / "without_fat5.py"


def test_a_folder_of_fat5_is_read_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    config = FAT5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model = FAT5ForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder)])
    code = runpy.run_path(str(SCRIPT))["main"]()
    sys.stdout.flush()
    printed, error = capfd.readouterr()
    assert code == 0, printed + error
    for line in (
        "import fat5                No module named 'fat5'",
        "transformers.models.t5.modeling_t5.T5ForConditionalGeneration, missing 0, unexpected 0",
        "greedy tokens              the same",
        "CTranslate2, greedy        the same tokens",
    ):
        assert line in printed
