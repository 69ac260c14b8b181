"""`fat5 tokenizer` as typed."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fat5.cli.main import main
from fat5.data import load_tokenizer, sample_path


def test_trains_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "tokenizer"
    arguments = ["--output_dir", str(output), "--vocab_size", "2048", "--rows", "300"]
    assert main(["tokenizer", str(sample_path("fr")), *arguments]) == 0
    said = capsys.readouterr().out
    assert "bpe, 2,048 ids; on 300 documents" in said
    assert "tokens a word" in said
    assert "0.00% unknown" in said
    assert len(AutoTokenizer.from_pretrained(output)) == 2048


def test_skipped_rows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "un"}\n{"text": \n{"text": "deux"}\n')
    words = ["tokenizer", str(tmp_path / "a.jsonl"), "--output_dir", str(tmp_path / "t"), "--vocab_size", "640"]
    assert main([*words, "--corpus.on_bad_row", "skip"]) == 0
    assert "rows that could not be read and were skipped: 1" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_the_smallest_vocabulary(model: str, tmp_path: Path) -> None:
    output, text = tmp_path / "tokenizer", "Été ☃ \t\n x=1;é <extra_id_0>"
    words = ["--output_dir", str(output), "--vocab_size", "640", "--rows", "300", "--model", model]
    assert main(["tokenizer", str(sample_path("fr")), *words]) == 0
    tokenizer = load_tokenizer(output)
    assert tokenizer.info.vocab_size == 640
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_reads_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"tokenizer:\n  inputs: [{sample_path('fr')}]\n  output_dir: {tmp_path}/t\n  vocab_size: 1024\n  rows: 100\n"
        "  corpus:\n    text_column: text\n"
    )
    assert main(["tokenizer", "--config", str(tmp_path / "recipe.yaml"), "--model", "unigram"]) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "t")) == 1024


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.txt", "--output_dir", "{tmp}/t"], "nowhere.txt: no such file or folder"),
        (["{sample}", "--output_dir", "{tmp}/t", "--vocab_size", "70016"], "above 65,536"),
        (["{sample}", "--output_dir", "{tmp}/t", "--vocab_size", "1000"], "multiple of 128"),
        (["{sample}", "--output_dir", "{tmp}/t", "--corpus.text_column", "body"], "it has chapter, id, text"),
        (["{sample}", "--output_dir", "{tmp}"], "holds something already"),
        (["{sample}", "--output_dir", "{tmp}/t", "--model", "wordpiece"], "model"),
        (["{sample}", "--output_dir", "{tmp}/t", "--vocabulary", "1024"], "vocabulary"),
        (["{tmp}/pickle.jsonl", "--output_dir", "{tmp}/t"], "a pickle, which FAT5 never loads"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], said: str
) -> None:
    (tmp_path / "pickle.jsonl").write_bytes(b"\x80\x04\x95")
    filled = [word.format(tmp=tmp_path, sample=sample_path("fr")) for word in words]
    assert main(["tokenizer", *filled]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "t").exists()
