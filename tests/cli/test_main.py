"""`fat5` itself: verbs, exit codes, and that help needs nothing heavy."""

import io
import subprocess
import sys
from importlib import import_module

import pytest

from fat5.cli.main import VERBS, main
from fat5.cli.parsing import FIRST_KEYS


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_help_lists_every_verb(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


def test_unknown_verb_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "Did you mean `fat5 pretrain`?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_that_explains_each_key(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        import_module(f"fat5.cli.{verb}").main(["--help"])
    assert stopped.value.code == 0
    assert f"fat5 {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_an_unknown_key_with_exit_code_2(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--no_such_key", "1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fat5 {verb}: ")
    assert err.count("\n") == 1


def test_help_imports_no_torch() -> None:
    heavy = "any(name in sys.modules for name in ('torch', 'numpy', 'jsonargparse'))"
    code = f"import sys; from fat5.cli.main import main; main(['--help']); sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_imports_no_torch_and_begins_with_its_first_keys(verb: str) -> None:
    code = (
        f"import sys\nfrom fat5.cli.main import main\ntry: main([{verb!r}, '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(str({'torch', 'numpy', 'transformers', 'numba', 'datatrove'} & sys.modules.keys() or 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "0"
    first, _, rest = done.stdout.partition("all other keys:")
    assert "start with these:\n  --config" in first
    assert all(f"{key} " in first and f"--{key} " not in rest for key in FIRST_KEYS.get(verb, ()))


def test_import_fat5_needs_no_torch() -> None:
    code = "import sys, fat5; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fat5 0.")


class Closed(io.StringIO):
    """A pipe whose reader left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("argv", [["--help"], ["doctor"]])
def test_a_reader_that_leaves_early(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(argv) == 0


def test_nothing_is_said_of_a_pipe_that_broke() -> None:
    process = subprocess.Popen([sys.executable, "-m", "fat5", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # type: ignore[union-attr]
    assert process.stderr.read() == b""  # type: ignore[union-attr]
    assert process.wait() == 0


def test_a_terminal_of_another_alphabet(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    monkeypatch.setattr("fat5.cli.plot.main", lambda argv: print("é"))
    assert main(["plot"]) == 0
    assert buffer.getvalue() == b"\\xe9\n"
