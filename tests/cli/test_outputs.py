"""An output that cannot be written, a line break in a path, a device or seed that cannot be: one line, exit code 2."""

from pathlib import Path

import pytest

from fat5.cli.main import VERBS, main
from fat5.errors import ConfigurationError, FAT5Error, check_writable
from fat5.generate import Decoding
from made_run import pretrain, tiny


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    pretrain(tiny(prepared, folder, steps=1))
    return folder


SMALL = ["--max_tokens", "64", "--encoder_tokens", "256", "--decoder_tokens", "128"]
COMMANDS = {
    "tokenizer": (["{corpus}", "--vocab_size", "1024", "--output_dir"], True),
    "prepare": (["{corpus}", "--tokenizer", "{prepared}/tokenizer", "--workers", "1", "--output_dir"], True),
    "audit": (["{prepared}", *SMALL, "--output_dir"], True),
    "convert": (["{run}", "--output_dir"], True),
    "pretrain": (["--data.sources", "[{{path: {prepared}}}]", "--output_dir"], True),
    "evaluate": (["--model", "{run}", "--output"], False),
    "generate": (["--model", "{run}", "Le ___", "--output"], False),
    "plot": (["{run}", "--output"], False),
}


@pytest.mark.parametrize("verb", COMMANDS)
def test_an_output_that_cannot_be_written(verb, run, prepared, tmp_path, capsys):
    words, folder = COMMANDS[verb]
    (tmp_path / "corpus.txt").write_text("Le noyau est libre.\n")
    places = {"corpus": tmp_path / "corpus.txt", "prepared": prepared, "run": run}
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    for output in ("file" if folder else "folder", "file/below"):
        capsys.readouterr()
        assert main([verb, *(word.format(**places) for word in words), str(tmp_path / output)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"fat5 {verb}: ")
        assert str(tmp_path / "file") in err or output in err
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.txt", "file", "folder"]


def test_check_writable(tmp_path):
    (tmp_path / "file").touch()
    assert check_writable(tmp_path / "file") == tmp_path / "file"
    assert check_writable(tmp_path / "new" / "newer", folder=True) == tmp_path / "new" / "newer"
    assert not (tmp_path / "new").exists()
    for path, folder, why in [
        (tmp_path, False, "is a folder"),
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "new" / "x", False, "its folder does not exist"),
        (tmp_path / "file" / "x", True, "is not a folder"),
    ]:
        with pytest.raises(ConfigurationError, match=why):
            check_writable(path, folder=folder)


def test_no_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    with pytest.raises(ConfigurationError, match="permission denied"):
        check_writable(tmp_path / "x")


def test_an_error_of_the_system_is_one_line(monkeypatch, capsys):
    def full(argv):
        raise OSError(28, "No space left on device", "a\nb.png")

    monkeypatch.setattr("fat5.cli.plot.main", full)
    assert main(["plot"]) == 2
    said = "fat5 plot: a b.png: No space left on device. Make room, and run the same command again\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("verb", VERBS)
def test_a_line_break_in_a_path_stays_one_line(verb, tmp_path, capsys):
    assert main([verb, "--config", str(tmp_path / "a\nb.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert "\n" not in str(FAT5Error("a\nb", where=Path("c\nd"), hint="e\nf"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device", "tpu"], "device: no device 'tpu'"),
        (["--device", "cuda:99"], "device: no device 'cuda:99'"),
        (["--seed", "-1"], "seed: -1"),
        (["--seed", str(1 << 64)], "seed: "),
    ],
)
def test_a_device_and_a_seed(run, capsys, words, says):
    assert main(["generate", "--model", str(run), "Le ___", *words]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_the_seed_of_a_conversion(run, tmp_path, capsys):
    assert main(["convert", str(run), "--output_dir", str(tmp_path / "new"), "--seed", str(1 << 64)]) == 2
    assert "seed: " in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="seed"):
        Decoding(seed=-1)


@pytest.mark.parametrize("verb", VERBS)
def test_an_argument_that_is_not_utf8(verb, capsys):
    assert main([verb, "--output_dir", "r\udcff"]) == 2
    assert capsys.readouterr().err == f"fat5 {verb}: 'r\\udcff': not UTF-8. Rename it, or set a UTF-8 locale\n"


def test_tuning_asks_first_whether_its_rows_can_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the minutes of measuring, not after."""
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setenv("FAT5_CACHE", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["bench", "kernels", "--autotune"]) == 2
    assert f"{tmp_path}/launch_table.json: the tuned rows cannot be written here" in capsys.readouterr().err
