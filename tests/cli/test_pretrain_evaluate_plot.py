"""The three commands as a user types them, in one chain: pretrain, continue, evaluate, plot."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file

from fat5.cli.main import main
from fat5.tasks import SourceConfig, pretrain
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


@pytest.fixture(scope="module")
def weighted(prepared, tmp_path_factory):
    """A run whose settings are all other than evaluate's own, on two folders of unequal weight."""
    folder = tmp_path_factory.mktemp("weighted")
    lines = (prepared.parent / "corpus.jsonl").read_text().splitlines(keepends=True)
    (folder / "short.txt").write_text("\n".join(json.loads(line)["text"][:90].replace("\n", " ") for line in lines))
    words = ["--tokenizer", str(prepared / "tokenizer"), "--output_dir", str(folder / "short"), "--workers", "1"]
    words += ["--corpus.txt_documents", "line", "--validation_fraction", "0.3"]
    assert main(["prepare", str(folder / "short.txt"), *words]) == 0
    config = tiny(
        prepared,
        folder / "run",
        data={"mixture": "ul2", "packs_per_micro_batch": 2, "max_tokens": 48},
        precision="bf16",
        steps=4,
        eval_tokens=300,
    )
    config.data.sources = [SourceConfig(str(prepared), 3.0), SourceConfig(str(folder / "short"), 1.0)]
    return folder / "run", pretrain(config)


@pytest.mark.parametrize("part", ["", "model", "checkpoints/step-4"])
def test_evaluate_agrees_with_the_run_exactly(weighted, tmp_path, capsys, part):
    run, summary = weighted
    assert main(["evaluate", "--model", str(run / part), "--output", str(tmp_path / "scores.json")]) == 0
    table = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["loss"] == summary["val_loss_last"]
    assert {name: row["loss"] for name, row in scores["by_denoiser"].items()} == summary["val_loss_by_denoiser"]
    assert scores["unigram_entropy"] == summary["unigram_entropy"]
    assert all(name in table for name in scores["by_denoiser"])
    assert "unigram entropy" in table


def test_flags_of_evaluate_win_over_the_run(weighted, prepared, tmp_path, capsys):
    run, summary = weighted
    folders = [source["path"] for source in yaml.safe_load((run / "config.yaml").read_text())["data"]["sources"]]
    losses = []
    for words in (
        ["--weights", "3", "1"],
        ["--weights", "1", "3"],
        [],
        ["--weights", "3", "1", "--eval_tokens", "150"],
    ):
        words += ["--data", *folders, "--output", str(tmp_path / "scores.json")]
        assert main(["evaluate", "--model", str(run), *words]) == 0
        losses.append(json.loads((tmp_path / "scores.json").read_text())["loss"])
    assert losses[0] == summary["val_loss_last"]
    assert len(set(losses)) == 4
    capsys.readouterr()
    assert main(["evaluate", "--model", str(run), "--weights", "1"]) == 2
    assert "1 weights for 2 folders" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text("of: something else")
    assert main(["evaluate", "--model", str(tmp_path / "model")]) == 2
    assert "data is not given" in capsys.readouterr().err


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
