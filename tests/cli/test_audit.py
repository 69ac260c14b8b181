import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fat5.cli.main import main
from fat5.data import load_tokenizer, sample_path
from fat5.data.shards.prepare import PrepareConfig, prepare
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("audit")
    text = [str(sample_path("fr"))]
    train_tokenizer(TokenizerTraining(inputs=text, output_dir=str(folder / "tokenizer"), vocab_size=2048))
    prepare(
        PrepareConfig(inputs=text, tokenizer=str(folder / "tokenizer"), output_dir=str(folder / "shards"), workers=1)
    )
    return str(folder / "shards")


def test_audit_prints_the_report_and_writes_it(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(["audit", corpus, "--output_dir", str(out), "--tokens", "200000", "--encoder_tokens", "4096"])
    printed = capsys.readouterr().out
    report = json.loads((out / "audit.json").read_text())
    assert code == 0
    assert (out / "audit.png").exists()
    assert "[S]" in printed
    assert "<extra_id_0>" in printed
    assert f"decoder_tokens {report['suggested']['decoder_tokens']}" in printed
    assert f"{report['examples']:,} of {report['examples']:,} examples reconstruct exactly" in printed
    tokens = load_tokenizer(f"{corpus}/tokenizer").info.vocab_size
    assert report["tokenizer"]["vocab_size"] == tokens
    assert np.isclose(sum(row["proportion"]["asked"] for row in report["mixture"]), 1)


def test_a_mixture_from_yaml(corpus, tmp_path, capsys):
    recipe = tmp_path / "audit.yaml"
    recipe.write_text(
        "mixture:\n  - {mu: 3.0, r: 0.15, max_spans: max_token_length, prefix: '[R]', proportion: 1.0}\n"
        "  - {mu: 2.0, r: 0.0, max_spans: 1, prefix: '[S]', proportion: 3.0}\ntokens: 60000\nencoder_tokens: 4096\n"
    )
    assert main(["audit", corpus, "--config", str(recipe), "--output_dir", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/audit.json").read_text())
    assert [row["proportion"]["asked"] for row in report["mixture"]] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prepared folder"),
        (["/nowhere"], "manifest.json"),
        (["CORPUS", "--mixture", "nope"], "fat5, fat5-anywhere, ul2, t5, prefix-lm"),
        (["CORPUS", "--encoder_tokens", "1000"], "multiple of 128"),
        (["CORPUS", "--encoder_tokens", "many"], "encoder_tokens"),
        (["CORPUS", "--colour", "red"], "colour"),
        (["CORPUS", "--split", "test"], "no split"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(corpus, tmp_path, capsys, arguments, message):
    words = [corpus if word == "CORPUS" else word for word in arguments]
    assert main(["audit", *words, "--output_dir", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_damaged_corpus_is_one_line_from_a_real_process(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "shards")
    shard = next((tmp_path / "shards/train").glob("*.ds"))
    shard.write_bytes(shard.read_bytes()[:-2])
    command = [sys.executable, "-m", "fat5", "audit", str(tmp_path / "shards"), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert shard.name in done.stderr
    assert "Traceback" not in done.stderr
