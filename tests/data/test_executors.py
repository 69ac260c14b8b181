"""Preparing on a cluster: Slurm's scripts as text and as they run, Ray, and machines that have neither."""

import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from preparing import config, manifest, write_jsonl

from fat5.data.shards.plan import read_plan
from fat5.data.shards.prepare import SlurmOptions, finish, prepare
from fat5.errors import ConfigurationError, DataError


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of Slurm that only write down what they were given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {
        "sbatch": f'echo "$@" >> {tmp_path}/calls; cp "${{@: -1}}" {tmp_path}/script.$(wc -l < {tmp_path}/calls); '
        f'echo "Submitted batch job $(wc -l < {tmp_path}/calls)"',
        "scontrol": "echo localhost",
    }.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755 | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


@pytest.mark.usefixtures("small_tasks")
def test_slurm_submits_an_array_and_a_last_job(cluster: Path, tokenizer: str, texts: list[str]) -> None:
    keys = config(
        cluster,
        tokenizer,
        write_jsonl(cluster / "a.jsonl", texts),
        executor="slurm",
        workers=4,
        slurm=SlurmOptions(partition="cpu", time="01:00:00", memory_gb=8, environment="source env.sh"),
    )
    assert prepare(keys) is None
    tasks = len(read_plan(cluster / "out").tasks)
    calls = (cluster / "calls").read_text().splitlines()
    array, last = ((cluster / f"script.{index}").read_text() for index in (1, 2))
    for line in (
        "#SBATCH --partition=cpu",
        "#SBATCH --time=01:00:00",
        "#SBATCH --mem-per-cpu=8G",
        f"#SBATCH --array=0-{tasks - 1}%4",
        "#SBATCH --job-name=fat5-tokens",
        "source env.sh",
        f"srun -l -n 1 {sys.executable} -m fat5.data.shards.executors {cluster / 'out'} tokens",
    ):
        assert line in array.splitlines()
    assert "--dependency=afterok:1" in calls[1]
    assert f"{sys.executable} -m fat5.data.shards.executors {cluster / 'out'} finish" in last.splitlines()
    assert "--array" not in last
    assert not list((cluster / "out").rglob("*.pik")), "nothing is pickled"


@pytest.mark.usefixtures("small_tasks")
def test_what_slurm_runs_makes_the_same_shards(
    cluster: Path, tokenizer: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fat5.data.shards.executors import main

    corpus = write_jsonl(cluster / "a.jsonl", texts[:150])
    keys = config(cluster, tokenizer, corpus)
    prepare(replace(keys, output_dir=str(cluster / "local")))
    prepare(replace(keys, executor="slurm", slurm=SlurmOptions(partition="cpu")))
    tasks = len(read_plan(cluster / "out").tasks)
    with pytest.raises(DataError, match="is not done"):
        finish(cluster / "out")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", str(tasks - 1))
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    for index in range(tasks):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index))
        assert main([str(cluster / "out"), "tokens"]) == 0
    assert main([str(cluster / "out"), "finish"]) == 0
    assert manifest(cluster / "out") == manifest(cluster / "local")


def test_without_slurm_it_says_so(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    corpus = write_jsonl(tmp_path / "a.jsonl", ["un deux"])
    keys = config(tmp_path, tokenizer, corpus, executor="slurm", slurm=SlurmOptions(partition="cpu"))
    with pytest.raises(ConfigurationError, match="no sbatch on this machine"):
        prepare(keys)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tasks")
def test_ray_makes_the_same_shards(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    pytest.importorskip("ray", reason="waits on `pip install ray`")
    keys = config(tmp_path, tokenizer, write_jsonl(tmp_path / "a.jsonl", texts))
    prepare(replace(keys, output_dir=str(tmp_path / "local")))
    prepare(replace(keys, executor="ray", workers=2))
    assert manifest(tmp_path / "out") == manifest(tmp_path / "local")


def test_without_ray_it_says_so(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    corpus = write_jsonl(tmp_path / "a.jsonl", ["un deux"])
    with pytest.raises(ConfigurationError, match="Ray is not installed"):
        prepare(config(tmp_path, tokenizer, corpus, executor="ray"))
