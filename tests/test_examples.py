"""Every file of examples/ runs as a script, at tiny size."""

import gzip
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from fat5.data import load_tokenizer, sample_path
from made_shell import fat5_on_path

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 16}
TINY = ["--model.preset", "fat5-demo", "--model.overrides", json.dumps(SIZES), "--data.max_tokens", "64"]
TINY += ["--data.encoder_tokens", "512", "--data.decoder_tokens", "384", "--data.packs_per_step", "1"]
TINY += ["--data.num_workers", "0", "--steps", "2", "--eval_tokens", "256"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What command_line.sh makes of 300 French paragraphs, and what it prints."""
    folder = tmp_path_factory.mktemp("desk")
    rows = gzip.decompress(Path(sample_path("fr")).read_bytes()).decode().splitlines(keepends=True)[:300]
    (folder / "my_text.jsonl").write_text("".join(rows), encoding="utf-8")
    script = ["sh", str(EXAMPLES / "command_line.sh"), "my_text.jsonl", "made", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fat5.train.run.draw_run", lambda *arguments: None)  # it has tests of its own
        patch.setattr("fat5.train.trainer.peak_flops", lambda *arguments: 1e12)
        with fat5_on_path() as environment:
            environment |= {"VOCAB_SIZE": "1024", "EPOCHS": "0.05"}
            ran = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return folder / "made", ran.stdout


def run(script, arguments, monkeypatch, capsys):
    """What the script prints."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return capsys.readouterr().out


def test_command_line(made):
    folder, printed = made
    assert json.loads((folder / "run" / "summary.json").read_text())["steps"] == 2
    assert "\nLe paquet est installé" in printed
    results = json.loads((folder / "task" / "results.json").read_text())
    said = json.loads(printed[printed.rindex("\n{\n") :])["results"]
    assert said == {name: score["value"] for name, score in results["metrics"].items()}


def test_plain_pytorch(made, tmp_path, monkeypatch, capsys):
    arguments = ["--shards", made[0] / "shards", "--output_dir", tmp_path / "plain", "--overrides", json.dumps(SIZES)]
    small = ["--steps", 12, "--max_tokens", 64, "--encoder_tokens", 512]
    printed = run("plain_pytorch.py", arguments + small, monkeypatch, capsys)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[-1] < losses[0]
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "plain")) is T5ForConditionalGeneration


def test_stock_transformers(made, monkeypatch, capsys):
    printed = run("stock_transformers.py", [made[0] / "run" / "model", "--max_new_tokens", 4], monkeypatch, capsys)
    assert printed.count(" -> ") == 2
    before, after = map(float, re.search(r"loss ([\d.]+), after one step ([\d.]+)", printed).groups())
    assert after < before


def test_collator_with_trainer(made, tmp_path, monkeypatch, capsys):
    text = made[0].parent / "my_text.jsonl"
    small = ["--text", text, "--max_tokens", 64, "--batch_size", 2, "--steps", 20, "--output_dir", tmp_path / "ul2"]
    printed = run("collator_with_trainer.py", [made[0] / "run" / "model", *small], monkeypatch, capsys)
    before, after = map(float, re.search(r"loss ([\d.]+), at the end ([\d.]+)", printed).groups())
    assert after < before
    mode = load_tokenizer(made[0] / "run" / "model").info.mode_ids["[X]"]
    assert AutoTokenizer.from_pretrained(tmp_path / "ul2")("[X] mot").input_ids[0] == mode


def test_lora_peft(made, tmp_path, monkeypatch, capsys):
    arguments = [made[0] / "run" / "model", "--output_dir", tmp_path / "adapter", "--steps", 12]
    printed = run("lora_peft.py", arguments, monkeypatch, capsys)
    before, after, read = re.findall(r"[\d.]+", printed.splitlines()[-1])
    assert after == read
    assert float(after) < float(before)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
