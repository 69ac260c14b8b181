"""The three commands as a user types them, in one chain: pretrain, continue, evaluate, plot."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from fat5.cli.main import main
from made_run import tiny


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "recipe.yaml").write_text(tiny(prepared, "from the recipe").to_yaml())
    assert (
        main(["pretrain", "--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / "run"), "--steps", "4"])
        == 0
    )
    return folder / "run"


def test_pretrain_continues_by_itself(run, capsys):
    recipe = str(run.parent / "recipe.yaml")
    assert main(["pretrain", "--config", recipe, "--output_dir", str(run), "--steps", "6"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["steps"] == 6
    assert "step-4 (the newest that verifies)" in printed.err
    assert "warning: steps was 4" in printed.err


@pytest.mark.parametrize("part", ["", "model", "checkpoint"])
def test_evaluate_agrees_with_the_run(prepared, run, tmp_path, capsys, part):
    model = {"": run, "model": run / "model"}.get(part) or max((run / "checkpoints").iterdir())
    words = ["--model", str(model), "--eval_tokens", "200", "--output", str(tmp_path / "scores.json")]
    if part:
        words += ["--data", json.dumps([str(prepared)]), "--max_tokens", "64"]
        words += ["--encoder_tokens", "256", "--decoder_tokens", "128"]
    assert main(["evaluate", *words]) == 0
    table = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert scores["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert scores["by_denoiser"].keys() == last["by_denoiser"].keys()
    assert all(name in table for name in scores["by_denoiser"])
    assert "unigram entropy" in table


def test_evaluate_refuses_another_tokenizer(prepared, run, tmp_path, capsys):
    shutil.copytree(run / "model", tmp_path / "model")
    tokenizer = tmp_path / "model" / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=3))
    words = ["--model", str(tmp_path / "model"), "--data", json.dumps([str(prepared)]), "--max_tokens", "64"]
    assert main(["evaluate", *words]) == 2
    assert "prepared with another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("factor", "says"),
    [(float("nan"), "lm_head.weight holds NaN or infinity"), (1e38, "its loss on this data is")],
    ids=["weights", "loss"],
)
def test_evaluate_writes_no_table_of_nan(factor, says, prepared, run, tmp_path, capsys):
    shutil.copytree(run / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] *= factor / tensors["lm_head.weight"].abs().max()
    save_file(tensors, file, metadata={"format": "pt"})
    words = ["--model", str(tmp_path / "model"), "--data", json.dumps([str(prepared)]), "--max_tokens", "64"]
    assert main(["evaluate", *words, "--output", str(tmp_path / "scores.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "scores.json").exists()


def test_plot(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(run), "--output", "one.png"]) == 0
    assert main(["plot", str(run), str(run), "--x", "tokens"]) == 2
    assert main(["plot", str(run), "--x", "hours"]) == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(run), "--output", "nowhere/x.png"]) == 2
    assert "its folder does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["pretrain", "evaluate", "plot"])
def test_help_names_every_key(verb, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([verb, "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    for key in {
        "pretrain": ["--optimizer.lr", "--data.sources", "--on_nan"],
        "evaluate": ["--eval_tokens"],
        "plot": ["--x"],
    }[verb]:
        assert key in text
