"""Fault 20: bad input to pretrain, evaluate and plot. One clear line, exit code 2, nothing half-written.

And fault 6 as pretrain sees it: a damaged shard is named.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from fat5.cli.main import main
from fat5.tasks import pretrain
from made_run import tiny


def recipe(folder, config, **changes):
    """A YAML file; nested keys as in {"data": {"max_tokens": 8}}."""
    content = config.to_dict()
    for key, value in changes.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def refused(capsys, *arguments):
    """Runs a command that must fail; returns its one line."""
    assert main(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"fat5 {arguments[0]}: ")]
    assert len(lines) == 1
    assert "Traceback" not in lines[0]
    return lines[0]


BAD_KEYS = {
    "unknown key": ({"stepz": 5}, "stepz"),
    "unknown nested key": ({"data": {"max_token": 5}}, "max_token"),
    "wrong type": ({"steps": "many"}, "steps"),
    "no steps": ({"steps": 0}, "steps: must be a whole number from 1 to 1,099,511,627,776, not 0"),
    "precision": ({"precision": "fp8"}, "precision"),
    "mixture": ({"data": {"mixture": "ul3"}}, "no mixture is named 'ul3'"),
    "denoiser": ({"data": {"mixture": [{"mu": 3.0, "r": 1.5}]}}, "r (corruption rate)"),
    "budget": ({"data": {"encoder_tokens": 200}}, "data.encoder_tokens: must be a multiple of 128"),
    "budget below an example": ({"data": {"max_tokens": 4096}}, "is smaller than one example"),
    "budget beyond int32": ({"data": {"encoder_tokens": 128 * 10**30}}, "to 16,777,216"),
    "endless step": ({"data": {"packs_per_step": 10**12}}, "data.packs_per_step: must be a whole number"),
    "endless model": ({"model": {"overrides": {"num_layers": 10**12}}}, "num_layers: expected 1 to 4,096, got 1,000,"),
    "width beyond int64": ({"model": {"overrides": {"d_model": 10**30}}}, "d_model: expected 1 to 16,777,216"),
    "distance beyond int64": (
        {"model": {"overrides": {"relative_attention_max_distance": 10**30}}},
        "relative_attention_max_distance: expected 1 to 16,777,216",
    ),
    "norm that divides everything away": (
        {"model": {"overrides": {"layer_norm_epsilon": 1e300}}},
        "layer_norm_epsilon: expected 0 to 1, got 1e+300",
    ),
    "rotary base": ({"model": {"overrides": {"rotary_base": 1e300}}}, "rotary_base: expected 2 to 1,000,"),
    "no bool as override": ({"model": {"overrides": {"alibi_asymmetric": "x"}}}, "alibi_asymmetric: expected true or"),
    "override of an output": ({"model": {"overrides": {"output_attentions": True}}}, "has no key 'output_attentions'"),
    "endless span": ({"data": {"mixture": [{"mu": 1e300, "r": 0.15}]}}, "must be a number from 1 to 16,777,216"),
    "share of a denoiser": (
        {"data": {"mixture": [{"mu": 3.0, "r": 0.15, "proportion": 1e300}]}},
        "mixture[0].proportion: must be a number",
    ),
    "endless run": ({"steps": 2**63}, "from 1 to 1,099,511,627,776"),
    "endless evaluation": ({"eval_tokens": 2**70}, "not 1180591620717411303424"),
    "workers": ({"data": {"num_workers": 2**31}}, "from 0 to 1,024"),
    "eps": ({"optimizer": {"eps": 1e300}}, "optimizer.eps is 1e+300. Give a number from 0 to 1,000"),
    "decay": ({"optimizer": {"weight_decay": 2**70}}, "optimizer.weight_decay is"),
    "null for a name": ({"optimizer": {"name": None}}, "optimizer.name: null is no value here"),
    "null for a mapping": ({"model": {"overrides": None}}, "model.overrides: null is no value here"),
    "null for a mixture": ({"data": {"mixture": None}}, "data.mixture: null is no value here"),
    "null for a checkpoint": ({"resume": None}, "resume: null is no value here"),
    "division": ({"data": {"packs_per_micro_batch": 3}}, "packs_per_step"),
    "preset": ({"model": {"preset": "fat5-huge"}}, "fat5-huge"),
    "override": (
        {"model": {"overrides": {"d_modell": 5}}},
        "model.overrides has no key 'd_modell'. Did you mean d_model?",
    ),
    "type of a stock override": ({"model": {"overrides": {"num_heads": 3.5}}}, "'num_heads' expected int, got float"),
    "null override": ({"model": {"overrides": {"d_model": None}}}, "'d_model' expected int, got NoneType"),
    "type of an override of ours": ({"model": {"overrides": {"z_loss": "x"}}}, "z_loss: expected a number, got 'x'"),
    "no number as override": ({"model": {"overrides": {"z_loss": float("nan")}}}, "z_loss: expected a number"),
    "infinite learning rate": ({"optimizer": {"lr": float("inf")}}, "optimizer.lr"),
    "no learning rate": ({"optimizer": {"lr": float("nan")}}, "optimizer.lr"),
    "no such checkpoint": ({"resume": "/nowhere"}, "/nowhere"),
    "own override": (
        {"model": {"overrides": {"vocab_size": 5}}},
        "model.overrides.vocab_size is set by the run itself",
    ),
    "warm-up": ({"schedule": {"warmup_steps": 1000}}, "schedule.warmup_steps is 1000"),
    "optimizer key": ({"optimizer": {"momentum": 0.5}}, "optimizer.momentum is set, and adamw_scale does not take it"),
    "learning rate": ({"optimizer": {"lr": -1.0}}, "optimizer.lr is -1.0"),
    "clip": ({"gradient_clip": 0.0}, "gradient_clip is 0.0"),
    "keep": ({"keep_last": 0}, "keep_last: must be a whole number"),
    "no sources": ({"data": {"sources": []}}, "data.sources is empty"),
    "null for a share": (
        {"data": {"sources": [{"path": "PREPARED", "weight": None}]}},
        "data.sources[0].weight: must be a number",
    ),
    "no folder": ({"data": {"sources": [{"path": "/nowhere"}]}}, "/nowhere"),
    "no output": ({"output_dir": ""}, "output_dir is not given"),
}


@pytest.mark.parametrize(("changes", "named"), BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_bad_key(prepared, tmp_path, capsys, changes, named):
    file = recipe(tmp_path, tiny(prepared, tmp_path / "run"), **changes)
    Path(file).write_text(Path(file).read_text().replace("PREPARED", str(prepared)))
    line = refused(capsys, "pretrain", "--config", file)
    assert named in line
    assert not (tmp_path / "run").exists(), "nothing half-written"


@pytest.mark.parametrize(
    "content", ["", "- a list", "key: [unclosed", "\x00\x01\x02", "steps: !!python/object:os.system x"]
)
def test_bad_recipe(tmp_path, capsys, content):
    (tmp_path / "recipe.yaml").write_text(content)
    refused(capsys, "pretrain", "--config", str(tmp_path / "recipe.yaml"))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_shard_is_named(prepared, tmp_path, capsys, split, damage):
    shutil.copytree(prepared, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / ".verified", ignore_errors=True)
    shard = next((tmp_path / "data" / split).glob("*.ds"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flip" else content[:-2])
    line = refused(capsys, "pretrain", "--config", recipe(tmp_path, tiny(tmp_path / "data", tmp_path / "run")))
    assert f"{split}/{shard.name}" in line


def test_a_refused_checkpoint_leaves_no_folder_but_keeps_one_that_was_there(prepared, tmp_path, capsys):
    pretrain(tiny(prepared, tmp_path / "other", steps=2, seed=1))
    checkpoint = str(tmp_path / "other" / "checkpoints" / "step-2")
    refused(capsys, "pretrain", "--config", recipe(tmp_path, tiny(prepared, tmp_path / "run")), "--resume", checkpoint)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    refused(capsys, "pretrain", "--config", recipe(tmp_path, tiny(prepared, tmp_path / "run")), "--resume", checkpoint)
    assert (tmp_path / "run").exists()


def test_empty_and_foreign_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    line = refused(capsys, "pretrain", "--config", recipe(tmp_path, tiny(tmp_path / "empty", tmp_path / "run")))
    assert "no manifest.json" in line
    (tmp_path / "empty" / "manifest.json").write_text(json.dumps({"format": "something else"}))
    line = refused(capsys, "pretrain", "--config", recipe(tmp_path, tiny(tmp_path / "empty", tmp_path / "run")))
    assert "manifest.json" in line
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_beside_the_shards(prepared, tmp_path, capsys):
    shutil.copytree(prepared, tmp_path / "data")
    tokenizer = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"<extra_id_255>"', '"<extra_id_256>"'))
    refused(capsys, "pretrain", "--config", recipe(tmp_path, tiny(tmp_path / "data", tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["pretrain", "demo"])
def test_many_processes(verb, prepared, tmp_path, capsys, monkeypatch):
    """torchrun: refused before anything is written, and not by a lock that one process took from another."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = ["--config", recipe(tmp_path, tiny(prepared, tmp_path / "run"))] if verb == "pretrain" else []
    line = refused(capsys, verb, *config, "--output_dir", str(tmp_path / "run"))
    assert "WORLD_SIZE is 2" in line
    assert not (tmp_path / "run").exists()


def test_evaluate(prepared, tmp_path, capsys):
    assert "model is not given" in refused(capsys, "evaluate")
    assert "/nowhere: does not exist" in refused(capsys, "evaluate", "--model", "/nowhere")
    assert "data is not given" in refused(capsys, "evaluate", "--model", str(tmp_path))
    line = refused(capsys, "evaluate", "--model", str(tmp_path), "--data", json.dumps([str(prepared)]))
    assert "holds no model and no checkpoint" in line
    for key in ("max_tokens", "encoder_tokens", "decoder_tokens", "eval_tokens"):
        words = ["--model", str(tmp_path), "--data", str(prepared), f"--{key}", "0"]
        assert key in refused(capsys, "evaluate", *words)
    line = refused(capsys, "evaluate", "--model", str(tmp_path), "--data", str(tmp_path))
    assert "no manifest.json" in line
    pretrain(tiny(prepared, tmp_path / "run", steps=1))
    recipe = tmp_path / "run" / "config.yaml"
    for content in ("data: 5", "model: {}", "data: {sources: [a]}", "data: {sources: [{path: 5}]}", "\x00"):
        recipe.write_text(content)
        assert "run/config.yaml" in refused(capsys, "evaluate", "--model", str(tmp_path / "run"))
    recipe.unlink()
    weights = tmp_path / "run" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    words = ["--model", str(tmp_path / "run"), "--data", str(prepared)]
    assert "run/model: damaged" in refused(capsys, "evaluate", *words)


def test_plot(tmp_path, capsys):
    assert "no run is given" in refused(capsys, "plot")
    assert "holds no metrics.jsonl" in refused(capsys, "plot", str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("not JSON\n")
    assert "metrics.jsonl:1: not a JSON object" in refused(capsys, "plot", str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    assert "metrics.jsonl:1: not a row of a run: no loss" in refused(capsys, "plot", str(tmp_path))
    assert not (tmp_path / "loss.png").exists()


def test_a_key_twice_in_the_configuration_of_a_run(prepared, tmp_path, capsys):
    pretrain(tiny(prepared, tmp_path / "run", steps=1))
    config = tmp_path / "run" / "config.yaml"
    config.write_text("seed: 1\n" + config.read_text())
    line = refused(capsys, "evaluate", "--model", str(tmp_path / "run"))
    assert "run/config.yaml:3: key 'seed' stands twice" in line
