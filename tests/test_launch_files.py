"""The launch files of `recipes/launch/`: checked by bash, submitted to a Slurm made of scripts, and run: on two nodes,
to a time limit, through the loss of a machine. What is stopped in its middle ends as a run that was not.
"""

import configparser
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fat5.cli.parsing import parse
from fat5.cli.recipes import LAUNCH, launch_files
from fat5.tasks import PretrainConfig
from fat5.train import verify_checkpoint
from made_ranks import finish, torchrun
from made_run import assert_same_run, events, last_checkpoint, prepare_sample, tiny, wait_for_step
from made_slurm import FakeSlurm

PAGE = Path(__file__).parents[1] / "docs" / "many-devices.md"
SECONDS = 60.0
many = pytest.mark.skipif(not torch.distributed.is_available(), reason="waits for torch.distributed")


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm")


def submit(slurm: FakeSlurm, *words: str) -> dict:
    command = ["sbatch", "--nodes", "2", "--ntasks-per-node=1", "--partition", "gpu", str(LAUNCH / "slurm.sh"), *words]
    subprocess.run(command, env=os.environ | {"PATH": slurm.path}, check=True, stdout=subprocess.DEVNULL)
    return slurm.jobs[-1]


def loop(*command: str, **settings: str) -> subprocess.Popen:
    environment = os.environ | {"PAUSE": "0", "OMP_NUM_THREADS": "1"} | settings
    words = ["bash", str(LAUNCH / "spot.sh"), *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=environment, start_new_session=True, **pipes)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


@pytest.mark.parametrize("name", launch_files())
def test_it_is_well_formed_explained_and_on_the_page(name: str) -> None:
    text = (LAUNCH / name).read_text()
    assert f"`{name}`" in PAGE.read_text()
    assert text.splitlines()[name.endswith(".sh")].startswith("# FAT5 on ")
    assert max(map(len, text.splitlines())) <= 125
    if name.endswith(".sh"):
        assert subprocess.run(["bash", "-n", str(LAUNCH / name)], check=False).returncode == 0


# Slurm


def test_slurm_starts_the_processes_with_what_torchrun_would_say(slurm: FakeSlurm) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    slurm.program("fat5", f'for name in {names}; do echo "$RANK $name=${{!name}}"; done; printf "%s|" "$@"')
    job = submit(slurm, "pretrain", "--output_dir", "a folder")
    options = job["options"]
    assert (options["partition"], options["nodes"], options["gpus-per-node"]) == ("gpu", "2", "8")
    assert (options["signal"], options["open-mode"], "requeue" in options) == ("USR1@300", "append", True)
    assert slurm.start(job).wait(SECONDS) == 0
    log = (slurm.folder / "fat5-1.log").read_text()
    for rank in range(2):
        for line in (f"RANK={rank}", "LOCAL_RANK=0", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1"):
            assert f"{rank} {line}\n" in log
    assert log.count("pretrain|--output_dir|a folder|") == 2
    assert slurm.state(job) == "RUNNING", "a run that is done is not queued again"


@pytest.mark.parametrize(
    ("does", "code", "state"),
    [
        ("exit 138", 0, "REQUEUED"),  # the time limit
        ("exit 143", 0, "REQUEUED"),  # a preemption
        ("kill -USR1 $$", 0, "REQUEUED"),  # a signal while Python starts
        ("echo -n CANCELLED > state-1; exit 143", 143, "CANCELLED"),
        ("exit 2", 2, "RUNNING"),
        ("kill -KILL $$", 137, "RUNNING"),
    ],
)
def test_slurm_queues_again_what_was_stopped_and_nothing_else(
    slurm: FakeSlurm, does: str, code: int, state: str
) -> None:
    slurm.program("fat5", does)
    job = submit(slurm, "pretrain")
    assert slurm.start(job).wait(SECONDS) == code
    assert slurm.state(job) == state


# Whole runs, of two processes that talk by Gloo


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_sample(tmp_path_factory.mktemp("corpus"))


def recipe(data: Path, run: Path) -> str:
    """A run of a minute's fraction that saves at its end and when it is stopped."""
    path = run.with_suffix(".yaml")
    path.write_text(tiny(data, run, steps=60, save_every=1000, eval_every=30).to_yaml())
    return str(path)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run of two processes, by torchrun on one node, without a stop."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    code, _, error = finish(torchrun("pretrain", "--config", recipe(data, run)))
    assert code == 0, error
    return run


def check_resumed(undisturbed: Path, run: Path) -> None:
    assert_same_run(undisturbed, run)
    assert [event["event"] for event in events(run)].count("resumed") == 1


@many
@pytest.mark.slow
def test_slurm_stops_before_the_time_limit_and_goes_on(
    slurm: FakeSlurm, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    slurm.program("fat5", f'exec {sys.executable} -m fat5 "$@"')
    job = submit(slurm, "pretrain", "--config", recipe(data, run))
    script = slurm.start(job)
    wait_for_step(run, 5)
    slurm.signal(job, signal.SIGUSR1)
    assert script.wait(SECONDS) == 0
    assert slurm.state(job) == "REQUEUED"
    assert 5 <= verify_checkpoint(last_checkpoint(run))["step"] < 60
    assert slurm.start(job, restarts=1).wait(2 * SECONDS) == 0
    assert slurm.state(job) == "RUNNING"
    check_resumed(undisturbed, run)
    log = (slurm.folder / "fat5-1.log").read_text()
    assert "stopped by SIGUSR1 after step" in log
    assert "stopped and saved (exit code 138); job 1 is queued again" in log


@many
@pytest.mark.slow
def test_slurm_saves_when_cancelled_and_stays_so(slurm: FakeSlurm, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    slurm.program("fat5", f'exec {sys.executable} -m fat5 "$@"')
    job = submit(slurm, "pretrain", "--config", recipe(data, run))
    script = slurm.start(job)
    wait_for_step(run, 5)
    slurm.cancel(job)
    script.send_signal(signal.SIGTERM)  # the script gets it too
    assert script.wait(SECONDS) == 143
    assert slurm.state(job) == "CANCELLED"
    assert verify_checkpoint(last_checkpoint(run))["step"] >= 5


@many
@pytest.mark.slow
def test_two_nodes_stop_together_and_go_on(slurm: FakeSlurm, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    slurm.program("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    words = ["bash", str(LAUNCH / "nodes.sh"), "pretrain", "--config", recipe(data, run)]

    def start() -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        where = {"NODES": "2", "HEAD": "127.0.0.1", "PORT": port, "PROCESSES": "1", "PATH": slurm.path}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return [
            subprocess.Popen(words, env=os.environ | where | {"NODE_RANK": str(node)}, **pipes) for node in range(2)
        ]

    nodes = start()
    wait_for_step(run, 5)
    nodes[1].send_signal(signal.SIGTERM)
    ends = [finish(node, SECONDS) for node in nodes]
    assert [code != 0 for code, _, _ in ends] == [True, True]
    step = verify_checkpoint(last_checkpoint(run))["step"]
    assert 5 <= step < 60
    assert f"stopped by SIGTERM after step {step}" in ends[0][2]
    ends = [finish(node, 2 * SECONDS) for node in start()]
    assert [code for code, _, _ in ends] == [0, 0], ends
    check_resumed(undisturbed, run)


# A machine that is taken away


def test_spot_runs_the_command_until_it_succeeds(tmp_path: Path) -> None:
    often = f'echo x >> {tmp_path}/starts; test "$(wc -l < {tmp_path}/starts)" -ge 4 && exit 0; kill -TERM $$'
    code, _, error = finish(loop("bash", "-c", often), SECONDS)
    assert (code, error.count("exit code 143; the same command again in 0 s")) == (0, 3)


def test_spot_gives_up_on_what_ends_at_once(tmp_path: Path) -> None:
    code, _, error = finish(loop("bash", "-c", f"echo x >> {tmp_path}/starts; exit 2", LIMIT="3"), SECONDS)
    assert (code, (tmp_path / "starts").read_text()) == (2, "x\nx\nx\n")
    assert "spot.sh: 3 ends in a row within 120 s; the last exit code is 2" in error


def test_spot_counts_only_what_ends_at_once(tmp_path: Path) -> None:
    often = f'echo x >> {tmp_path}/starts; test "$(wc -l < {tmp_path}/starts)" -ge 4 && exit 0; exit 1'
    assert finish(loop("bash", "-c", often, LIMIT="2", QUICK="0"), SECONDS)[0] == 0


SAVING = """
import pathlib, signal, sys, time
folder, got = pathlib.Path(sys.argv[1]), []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: got.append(number))
(folder / "ready").touch()
while not got:
    time.sleep(0.02)
time.sleep(0.5)
(folder / "saved").write_text(str(len(got)))
sys.exit(128 + got[0])
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_spot_waits_for_the_save_when_it_is_stopped(tmp_path: Path, sent: int) -> None:
    """A terminal and `timeout` send the signal to the whole group; FAT5 would leave without saving at a second one."""
    process = loop(sys.executable, "-S", "-c", SAVING, str(tmp_path))
    wait_for(tmp_path / "ready")
    os.killpg(process.pid, sent)
    assert finish(process, SECONDS)[0] == 143
    assert (tmp_path / "saved").read_text() == "1"


def test_spot_ends_in_its_pause(tmp_path: Path) -> None:
    process = loop("bash", "-c", f"touch {tmp_path}/ready; exit 1", PAUSE="600")
    wait_for(tmp_path / "ready")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert finish(process, SECONDS)[0] in (1, 143)


@pytest.mark.slow
def test_spot_goes_on_exactly(data: Path, tmp_path: Path) -> None:
    """SIGTERM and SIGKILL to the run, SIGTERM to the loop, and a new loop."""
    clean, run = tmp_path / "clean", tmp_path / "run"
    command = [sys.executable, "-m", "fat5", "pretrain", "--config"]
    for folder in (clean, run):
        config = tiny(data, folder, steps=100, save_every=10, eval_every=50)
        folder.with_suffix(".yaml").write_text(config.to_yaml())
    assert finish(loop(*command, f"{clean}.yaml"))[0] == 0
    process = loop(*command, f"{run}.yaml")
    for step, sent in ((5, signal.SIGTERM), (25, signal.SIGKILL)):
        wait_for_step(run, step)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), sent)
    wait_for_step(run, 45)
    process.send_signal(signal.SIGTERM)
    code, _, error = finish(process, SECONDS)
    assert code == 143, error
    assert "exit code 143; the same" in error
    assert "exit code 137; the same" in error
    assert finish(loop(*command, f"{run}.yaml"))[0] == 0
    assert_same_run(clean, run)
    assert [event["event"] for event in events(run)].count("resumed") == 3


# systemd


def unit() -> configparser.ConfigParser:
    content = configparser.ConfigParser(interpolation=None)
    content.optionxform = str  # type: ignore[assignment,method-assign]
    content.read_string((LAUNCH / "fat5.service").read_text())
    return content


def test_the_service_restarts_saves_and_gives_up() -> None:
    """Its command is one that fat5 reads; signals and restarts are as FAT5 needs them."""
    service, general = unit()["Service"], unit()["Unit"]
    program, verb, *words = shlex.split(service["ExecStart"])
    assert (Path(program).name, verb) == ("fat5", "pretrain")
    assert PretrainConfig(**parse(PretrainConfig, words, verb)).output_dir.startswith(general["RequiresMountsFor"])
    assert (service["Restart"], service["KillMode"], service["KillSignal"]) == ("on-failure", "mixed", "SIGTERM")
    # Five starts must fit into the interval, or nothing is ever given up.
    assert int(service["RestartSec"]) * int(general["StartLimitBurst"]) < int(general["StartLimitIntervalSec"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="waits for systemd")
def test_systemd_reads_the_service(tmp_path: Path) -> None:
    text = re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", (LAUNCH / "fat5.service").read_text())
    (tmp_path / "fat5.service").write_text(text)
    verify = ["systemd-analyze", "verify", str(tmp_path / "fat5.service")]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert "fat5.service" not in done.stderr, done.stderr
