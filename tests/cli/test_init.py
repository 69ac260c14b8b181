"""`fat5 init`: its recipe goes through the whole chain, suits its device, and no file is overwritten."""

from pathlib import Path

import pytest
import yaml

from fat5.cli.main import main
from fat5.cli.parsing import parse
from fat5.data.config import PrepareConfig, TokenizerTraining
from fat5.tasks import PretrainConfig
from fat5.tasks.recipe import write_recipe

READERS = {"tokenizer": TokenizerTraining, "prepare": PrepareConfig, "pretrain": PretrainConfig}
SMALL = ["--steps", "2", "--eval_tokens", "256", "--data.encoder_tokens", "1024", "--model.overrides"]
SMALL += ["{d_model: 32, d_ff: 64, num_layers: 1, num_decoder_layers: 1, num_heads: 2, d_kv: 16}"]


def test_its_recipe_goes_from_text_to_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "sample:de", "--language", "de", "--device", "cpu"]) == 0
    recipe = ["--config", "recipe.yaml"]
    assert main(["doctor", *recipe]) == 2  # nothing is prepared yet
    assert main(["tokenizer", *recipe, "--vocab_size", "1024", "--rows", "300"]) == 0
    assert main(["prepare", *recipe, "--workers", "1"]) == 0
    assert main(["doctor", *recipe]) == 0
    assert main(["pretrain", *recipe, *SMALL]) == 0
    card = (tmp_path / "de-demo/run/model/README.md").read_text(encoding="utf-8")
    assert "- de" in card


@pytest.mark.parametrize(("size", "device"), [("small", "T4"), ("base", "A10"), ("large", "H100")])
def test_each_section_is_read_by_its_verb(size: str, device: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(write_recipe("ar", size, device, [], None, "recipe.yaml"), encoding="utf-8")
    values = {verb: READERS[verb](**parse(READERS[verb], ["--config", str(path)], verb)) for verb in READERS}
    run = values["pretrain"]
    assert isinstance(run, PretrainConfig)
    assert values["prepare"].corpus.subset == "ar"
    assert run.model.preset == f"fat5-{size}"
    assert run.precision == ("fp16" if device == "T4" else "bf16")
    tokens = run.data.encoder_tokens * run.data.packs_per_step
    assert tokens == 131_072, "a smaller device takes smaller packs, and more of them"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all("# " in line for line in lines if not line.endswith(":"))


def test_less_memory_keeps_less() -> None:
    kept = {}
    for device in ("H200", "H100", "L4"):
        run = yaml.safe_load(write_recipe("de", "large", device, [], None, "x"))["pretrain"]
        kept[device] = (run["gradient_checkpointing"], run["data"]["encoder_tokens"])
    assert kept["H200"][1] == kept["H100"][1] == 16_384
    assert kept["L4"][0] == "block"
    assert kept["L4"][1] < 16_384


def test_a_language_that_yaml_takes_for_a_truth() -> None:
    recipe = yaml.safe_load(write_recipe("no", "demo", "cpu", [], 7, "x"))
    assert recipe["pretrain"]["languages"] == ["no"]
    assert recipe["prepare"]["corpus"]["subset"] == "no"
    assert (recipe["pretrain"]["steps"], recipe["pretrain"]["precision"]) == (7, "auto")


def test_text_of_ones_own_leaves_the_sizes_to_the_run() -> None:
    text = write_recipe("de", None, "H100", ["my text.jsonl", "b.txt"], None, "x")
    recipe = yaml.safe_load(text)
    assert recipe["tokenizer"]["inputs"] == recipe["prepare"]["inputs"] == ["my text.jsonl", "b.txt"]
    assert "corpus" not in recipe["prepare"]
    sizes = ("max_tokens", "encoder_tokens", "decoder_tokens", "packs_per_step")
    assert {recipe["pretrain"]["data"][key] for key in sizes} == {"auto"} == {recipe["pretrain"]["steps"]}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "language: is required. Give its code: --language de"),
        (["--language", "German"], "language: 'German' is no code of a language. Give a code of ISO 639"),
        (["--language", "de", "--device", "Pentium"], "device: no data sheet of 'Pentium'"),
        (["--language", "de", "none.jsonl"], "none.jsonl: no such file or folder. Check the path"),
        (["--language", "de", "--size", "huge"], "size: expected demo, small, base or large, got 'huge'"),
        (["--language", "de", "--size", "large", "--device", "T4"], "size: fat5-large needs about 17.9"),
        (["--language", "de", "--steps", "0"], "steps: must be a whole number from 1"),
        (["--language", "de", "--output", "there.yaml"], "there.yaml: exists already. Choose another --output"),
        (["--language", "de", "--output", "no/where.yaml"], "no/where.yaml: cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    argv: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("mine\n")
    assert main(["init", *argv]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert Path("there.yaml").read_text() == "mine\n"
    assert not Path("recipe.yaml").exists()
