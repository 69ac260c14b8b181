"""`fat5 prepare` as typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fat5.cli.main import main
from fat5.data import sample_path
from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer
from made_tokenizers import word_piece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("cli") / "tokenizer"
    train_tokenizer(TokenizerTraining([str(sample_path("fr"))], str(output), vocab_size=2048, rows=300))
    return str(output)


def test_prepares_says_what_it_made_and_verifies(tmp_path: Path, tokenizer: str, capfd: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "out")
    words = [str(sample_path("fr")), "--tokenizer", tokenizer, "--output_dir", out, "--validation_fraction", "0.05"]
    assert main(["prepare", *words]) == 0
    said = capfd.readouterr()
    splits = json.loads((tmp_path / "out" / "manifest.json").read_bytes())["splits"]
    assert splits["train"]["documents"] + splits["validation"]["documents"] == 1923
    assert f"{out}/train: {splits['train']['documents']:,} documents, {splits['train']['tokens']:,} tokens" in said.out
    assert f"{splits['train']['tokens']:,} tokens, 0 of them <unk>" in said.out
    assert said.err == "", "datatrove's log belongs in the folder"
    assert main(["prepare", "--output_dir", out, "--verify", "true"]) == 0
    assert "agrees with its SHA-256" in capfd.readouterr().out
    shard = tmp_path / "out" / "train" / "00000.ds"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 4
    shard.write_bytes(content)
    assert main(["prepare", "--output_dir", out, "--verify", "true"]) == 2
    assert "00000.ds: shard is damaged" in capfd.readouterr().err


def test_says_how_much_the_tokenizer_does_not_know(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("le 日 noyau")
    words = ["--output_dir", str(tmp_path / "out"), "--validation_fraction", "0"]
    assert main(["prepare", str(tmp_path / "a.txt"), "--tokenizer", str(word_piece(tmp_path / "t")), *words]) == 0
    said = capfd.readouterr().out
    assert f"{tmp_path}/out/train: 1 documents, 3 tokens, 1 of them <unk>\n" in said
    assert "<unk> stands for text that the tokenizer has no token for" in said
    assert f"training puts no [CLS] before a text, nor does the tokenizer in {tmp_path}/out/tokenizer" in said


def test_the_log_is_off_the_terminal_in_processes_too(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "un deux trois " * 50}) + "\n")
    for index in range(3):
        (tmp_path / f"{index}.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes() * 1500)
    words = [*(str(tmp_path / f"{i}.jsonl") for i in range(3)), "--tokenizer", tokenizer, "--output_dir"]
    command = [sys.executable, "-m", "fat5", "prepare", *words, str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "documents" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["{tmp}/empty.jsonl"], "empty.jsonl: this file is empty"),
        (["{tmp}/binary.txt"], "binary.txt: is not .txt but binary data"),
        (["{tmp}/latin.txt"], "latin.txt:1: invalid UTF-8 (byte 0xe9"),
        (["{tmp}/notes.docx"], "notes.docx: unknown extension"),
        (["{tmp}/pickle.parquet"], "pickle.parquet: is not .parquet but a pickle, which FAT5 never loads"),
        (["{sample}", "--corpus.text_column", "body"], "no column 'body'; it has chapter, id, text"),
        (["{sample}", "--tokenizer", "{tmp}/pickle.parquet"], "a pickle, which FAT5 never loads"),
        (["{sample}", "--steps", "[magic]"], "no cleaning step 'magic'"),
        (["{sample}", "--wrokers", "3"], "workers"),
        ([], "no corpus given"),
    ],
)
def test_mistakes_are_one_line_exit_2_and_leave_nothing(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture, words: list[str], said: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "latin.txt").write_bytes("été\n".encode("latin-1"))
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "pickle.parquet").write_bytes(b"\x80\x04\x95")
    filled = [word.format(tmp=tmp_path, sample=sample_path("fr")) for word in words]
    if "--tokenizer" not in filled:
        filled += ["--tokenizer", tokenizer]
    assert main(["prepare", *filled, "--output_dir", str(tmp_path / "out"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_100_mb_line_is_one_line_and_little_memory(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n')
    code = (
        "import sys; from fat5.cli.main import main; code = main(sys.argv[1:]);"
        "print([line for line in open('/proc/self/status') if 'VmHWM' in line][0].split()[1]); sys.exit(code)"
    )
    words = ["prepare", str(path), "--tokenizer", tokenizer, "--output_dir", str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "long.jsonl:1: a line longer than 32 MiB" in done.stderr
    assert done.stderr.count("\n") == 1
    assert int(done.stdout.split()[-1]) < 600_000, "kilobytes at the peak"
    assert not (tmp_path / "out").exists()


def test_skipped_rows_are_said(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.csv").write_text("text\nBonjour\nBonjour, le monde\nAu revoir\n")
    words = ["prepare", str(tmp_path / "a.csv"), "--tokenizer", tokenizer, "--output_dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert "a.csv:3: fields in this row: 2, in the header: 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    words += ["--corpus.on_bad_row", "skip", "--validation_fraction", "0"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "out/train: 2 documents" in said
    assert f"and were skipped: 1 ({tmp_path}/out/logs/bad_rows names the first of each task)" in said
