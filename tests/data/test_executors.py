"""Preparing on a cluster: on a Slurm made of scripts, on Ray, and machines that have neither."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from preparing import config, manifest, write_jsonl

from fat5.data.config import SlurmOptions
from fat5.data.shards.plan import read_plan
from fat5.data.shards.prepare import finish, prepare
from fat5.errors import ConfigurationError, DataError
from made_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    made = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", made.path)
    return made


@pytest.mark.usefixtures("small_tasks")
def test_slurm_submits_an_array_and_a_last_job(
    slurm: FakeSlurm, tmp_path: Path, tokenizer: str, texts: list[str]
) -> None:
    folder = tmp_path / "a folder; with signs"
    folder.mkdir()
    keys = config(
        folder,
        tokenizer,
        write_jsonl(tmp_path / "a.jsonl", texts),
        executor="slurm",
        workers=4,
        slurm=SlurmOptions(partition="cpu", time="01:00:00", memory_gb=8, environment="source env.sh"),
    )
    assert prepare(keys) is None
    tasks = len(read_plan(folder / "out").tasks)
    array, last = slurm.jobs
    wanted = {
        "partition": "cpu",
        "time": "01:00:00",
        "mem-per-cpu": "8G",
        "array": f"0-{tasks - 1}%4",
        "job-name": "fat5-tokens",
        "output": f"{folder}/out/logs/tokens/slurm_logs/%A_%a.out",
    }
    assert wanted.items() <= array["options"].items()
    assert last["options"]["dependency"] == "afterok:1"
    assert "array" not in last["options"]
    run = [sys.executable, "-m", "fat5.data.shards.executors", str(folder / "out")]
    scripts = [(slurm.folder / f"script-{job['id']}").read_text().splitlines() for job in slurm.jobs]
    assert "source env.sh" in scripts[0]
    assert [shlex.split(script[-1]) for script in scripts] == [
        ["srun", "-l", "-n", "1", *run, "tokens"],
        [*run, "finish"],
    ]
    for job in slurm.jobs:
        subprocess.run(["bash", "-n", slurm.folder / f"script-{job['id']}"], check=True)
    assert not list((folder / "out").rglob("*.pik")), "nothing is pickled"


@pytest.mark.usefixtures("small_tasks")
def test_what_slurm_runs_makes_the_same_shards(
    slurm: FakeSlurm, tmp_path: Path, tokenizer: str, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fat5.data.shards.executors import main

    corpus = write_jsonl(tmp_path / "a.jsonl", texts[:150])
    keys = config(tmp_path, tokenizer, corpus)
    prepare(replace(keys, output_dir=str(tmp_path / "local")))
    prepare(replace(keys, executor="slurm", slurm=SlurmOptions(partition="cpu")))
    tasks = len(read_plan(tmp_path / "out").tasks)
    with pytest.raises(DataError, match="is not done"):
        finish(tmp_path / "out")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MAX", str(tasks - 1))
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    for index in range(tasks):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(index))
        assert main([str(tmp_path / "out"), "tokens"]) == 0
    assert main([str(tmp_path / "out"), "finish"]) == 0
    assert manifest(tmp_path / "out") == manifest(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.usefixtures("small_tasks")
def test_slurms_jobs_run_and_the_unfinished_tasks_are_submitted_again(
    slurm: FakeSlurm, tmp_path: Path, tokenizer: str, texts: list[str]
) -> None:
    """The scripts as they were submitted; one task of the array is lost with its node."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    keys = config(folder, tokenizer, write_jsonl(tmp_path / "a.jsonl", texts[:150]))
    prepare(replace(keys, output_dir=str(tmp_path / "local")))
    on_slurm = replace(keys, executor="slurm", slurm=SlurmOptions(partition="cpu"))
    prepare(on_slurm)
    tasks = len(read_plan(folder / "out").tasks)
    array, last = slurm.jobs
    lost = 1
    assert [slurm.start(array, array=index).wait(120) for index in range(tasks) if index != lost] == [0] * (tasks - 1)
    assert slurm.start(last).wait(120) != 0
    assert not (folder / "out" / "manifest.json").exists()
    prepare(on_slurm)
    again, last = slurm.jobs[2:]
    assert again["options"]["array"] == "0-0%1"
    assert slurm.start(again, array=0).wait(120) == 0
    assert slurm.start(last).wait(120) == 0
    assert manifest(folder / "out") == manifest(tmp_path / "local")


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


@pytest.mark.slow
@pytest.mark.usefixtures("small_tasks")
def test_a_fault_on_ray_names_its_log_and_the_rest_is_kept(tmp_path: Path, tokenizer: str, texts: list[str]) -> None:
    pytest.importorskip("ray", reason="waits on `pip install ray`")
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    rows = corpus.read_bytes().splitlines(keepends=True)
    rows[200] = b"{broken\n"
    corpus.write_bytes(b"".join(rows))
    keys = config(tmp_path, tokenizer, corpus, executor="ray", workers=2)
    with pytest.raises(DataError, match="tasks failed on Ray: 1") as caught:
        prepare(keys)
    assert "a.jsonl:201: not JSON" in Path(str(caught.value).split(": tasks failed")[0]).read_text()
    marks = tmp_path / "out" / "logs" / "tokens" / "completions"
    assert len(list(marks.iterdir())) == len(read_plan(tmp_path / "out").tasks) - 1


def test_without_ray_it_says_so(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    corpus = write_jsonl(tmp_path / "a.jsonl", ["un deux"])
    with pytest.raises(ConfigurationError, match="Ray is not installed"):
        prepare(config(tmp_path, tokenizer, corpus, executor="ray"))
