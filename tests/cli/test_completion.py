"""`fat5 completion`: what the Tab key offers in each shell, without torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fat5.cli.completion import MIXTURES, PRESETS, keys_of
from fat5.cli.main import VERBS, main
from fat5.cli.recipes import recipe_names
from fat5.data.examples import denoisers
from fat5.model import PRESETS as MODELS


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["completion", shell]) == 0
    path = folder / f"fat5.{shell}"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    return path


def offered(source: Path, line: str) -> list[str]:
    """What bash would offer for the last word of a line; it cuts words at spaces and at =."""
    words = line.replace("=", " = ").split(" ")
    ask = f'source {source}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _fat5; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", ask, "bash", *words], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_offers_verbs_keys_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = script("bash", tmp_path, capsys)
    assert set(offered(source, "fat5 ")) == set(VERBS)
    assert offered(source, "fat5 pre") == ["prepare", "pretrain"]
    assert set(offered(source, "fat5 pretrain --config ")) == set(recipe_names())
    assert set(offered(source, "fat5 pretrain --model.preset ")) == set(PRESETS)
    assert set(offered(source, "fat5 demo --pretrain.model.preset fat5-b")) == {"fat5-base"}
    assert offered(source, "fat5 pretrain --model.pr") == ["--model.preset"]
    assert offered(source, "fat5 pretrain --precision fp") == ["fp32", "fp16"]
    assert offered(source, "fat5 pretrain --precision=fp") == ["fp32", "fp16"]
    assert set(offered(source, "fat5 finetune --task ")) >= {"text-to-text", "sequence-classification"}
    assert offered(source, "fat5 doctor --json_output ") == ["true", "false"]
    assert offered(source, "fat5 init --size ") == ["demo", "small", "base", "large"]
    assert offered(source, "fat5 completion ") == ["bash", "zsh", "fish"]
    assert offered(source, "fat5 pretrain --output_dir ") == [], "files, by bash itself"


def test_each_verb_offers_every_key() -> None:
    for verb in VERBS:
        names = [key.name for key in keys_of(verb)]
        assert len(names) == len(set(names)), verb
        assert {"help", "config"} <= set(names)
    assert {"optimizer.lr", "data.encoder_tokens", "init_from"} <= {key.name for key in keys_of("pretrain")}


def test_the_names_are_those_that_there_are() -> None:
    assert set(PRESETS) == set(MODELS)
    assert set(MIXTURES) == set(denoisers.MIXTURES)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = script(shell, tmp_path, capsys)
    text = source.read_text(encoding="utf-8")
    for verb, what in VERBS.items():
        assert f"{verb}:{what}" in text or f"-a {verb} -d '{what}'" in text
    assert "bf16-pure" in text
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"waits for {shell}")
    assert subprocess.run([found, "-n", str(source)], check=False).returncode == 0


def test_it_needs_no_torch() -> None:
    code = (
        "import sys\nfrom fat5.cli.main import main\nmain(['completion', 'bash'])\n"
        "sys.exit(str({'torch', 'numpy', 'transformers', 'numba', 'datatrove'} & sys.modules.keys() or 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "0"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "shell: is required. Give bash, zsh or fish"),
        (["tcsh"], "shell: expected bash, zsh or fish, got 'tcsh'"),
        (["bash", "zsh"], "unrecognized arguments: zsh"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err
