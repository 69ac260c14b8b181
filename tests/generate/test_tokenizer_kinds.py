"""Every verb with every kind of tokenizer that T5s come with: prepare, pretrain, generate, convert."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from fat5.cli.main import main
from fat5.data import load_tokenizer
from fat5.data.shards.prepare import PrepareConfig, prepare
from made_run import tiny
from made_tokenizers import KINDS

SIZES = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": 384}
WORDS = ("le", "un", "noyau", "paquet", "pour", "de")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_from_text_to_answers(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fat5.train.run.draw_run", lambda *arguments: None)  # it has tests of its own
    monkeypatch.setattr("fat5.train.trainer.peak_flops", lambda *arguments: 1e12)
    own = KINDS[kind](tmp_path / "t")
    text = [" ".join(WORDS[(i * j) % 6] for j in range(1, 40)) + "." for i in range(1, 60)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    prepare(
        PrepareConfig([str(tmp_path / "corpus.jsonl")], str(own), str(tmp_path / "shards"), validation_fraction=0.2)
    )
    recipe = tiny(tmp_path / "shards", tmp_path / "run", steps=2)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert main(["pretrain", "--config", str(tmp_path / "recipe.yaml")]) == 0
    capfd.readouterr()
    # A run shows no <s>, and neither does the tokenizer that goes with it.
    saved, info = AutoTokenizer.from_pretrained(tmp_path / "run" / "model"), load_tokenizer(own).info
    assert saved("le").input_ids == [*load_tokenizer(own).encode("le"), info.eos_id]
    assert load_tokenizer(tmp_path / "run" / "model").info == info
    assert main(["generate", "le ___ pour", "--model", str(tmp_path / "run"), "--max_new_tokens", "4"]) == 0
    said = capfd.readouterr()
    assert said.out.startswith("le")
    assert said.out.endswith(" pour\n")
    assert said.err == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["hf", "fat5", "ctranslate2"])
def test_a_model_of_others_is_converted_and_answers(
    kind: str, to: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    source, copy = KINDS[kind](tmp_path / "source"), tmp_path / "copy"
    torch.manual_seed(0)
    info = load_tokenizer(source).info
    ids = {"pad_token_id": info.pad_id, "eos_token_id": info.eos_id, "decoder_start_token_id": info.pad_id}
    T5ForConditionalGeneration(T5Config(**SIZES, **ids)).save_pretrained(source)
    assert main(["convert", str(source), "--output_dir", str(copy), "--to", to]) == 0
    assert "the tokenizer encodes 3 texts to the same" in capfd.readouterr().out
    want = AutoTokenizer.from_pretrained(source)("le noyau, un").input_ids
    assert AutoTokenizer.from_pretrained(copy)("le noyau, un").input_ids == want
    if to == "ctranslate2":
        return
    answers = []
    for folder in (source, copy):
        words = ["le noyau, un", "--model", str(folder), "--mode", "text", "--max_new_tokens", "6"]
        assert main(["generate", *words]) == 0
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1]
