"""A Slurm made of scripts: `sbatch` checks and keeps a job, `run` starts it as a cluster would, on this host.

`sbatch`, `srun` and `scontrol` on PATH are this file. They refuse options that Slurm does not have, or that none of our
scripts should need.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

BATCH = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem-per-cpu", "partition", "qos"),
    *("time", "signal", "requeue", "open-mode", "output", "error", "array", "dependency", "export"),
}
FLAGS = {"requeue"}
STEP = {"kill-on-bad-exit", "wait", "gpu-bind", "cpus-per-task", "n", "l"}
HOSTS = "127.0.0.1,127.0.0.2"


class FakeSlurm:
    """The cluster of one test; `jobs` are what was submitted, by id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir(parents=True)
        for name in ("sbatch", "srun", "scontrol"):
            self.program(name, f'exec {sys.executable} -S {Path(__file__)} {folder} {name} "$@"')

    def program(self, name: str, body: str) -> None:
        """Puts a shell script on the cluster's PATH."""
        path = self.programs / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    @property
    def path(self) -> str:
        return f"{self.programs}:{os.environ['PATH']}"

    @property
    def jobs(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("job-*.json"))]

    def start(self, job: dict, restarts: int = 0, array: int | None = None) -> subprocess.Popen:
        """Starts a job's script, as the first node of its allocation does; its output goes where the job says."""
        options, number = job["options"], job["id"]
        (self.folder / f"state-{number}").write_text("RUNNING")
        nodes, each = int(options.get("nodes", 1)), int(options.get("ntasks-per-node", 1))
        environment = os.environ | {
            "PATH": self.path,
            "SLURM_JOB_ID": str(number),
            "SLURM_NTASKS": str(nodes * each),
            "SLURM_NTASKS_PER_NODE": str(each),
            "SLURM_CPUS_PER_TASK": options.get("cpus-per-task", "1"),
            "SLURM_JOB_NODELIST": HOSTS,
            "SLURM_NODELIST": HOSTS,
            "SLURM_RESTART_COUNT": str(restarts),
        }
        environment |= dict(pair.split("=") for pair in options.get("export", "ALL").split(",")[1:])
        output = options["output"].replace("%x", options["job-name"]).replace("%j", str(number))
        if array is not None:
            first, last = options["array"].partition("%")[0].split("-")
            environment |= {"SLURM_ARRAY_TASK_ID": str(array), "SLURM_ARRAY_TASK_MAX": last}
            environment["SLURM_ARRAY_TASK_MIN"] = first
            output = output.replace("%A", str(number)).replace("%a", str(array))
        mode = "a" if options.get("open-mode") == "append" else "w"
        with open(self.folder / output, mode) as log:
            command = ["bash", str(self.folder / f"script-{number}"), *job["arguments"]]
            return subprocess.Popen(command, env=environment, cwd=self.folder, stdout=log, stderr=log)

    def state(self, job: dict) -> str:
        return (self.folder / f"state-{job['id']}").read_text()

    def cancel(self, job: dict) -> None:
        """What `scancel` does first: the job is marked, and its processes get SIGTERM."""
        (self.folder / f"state-{job['id']}").write_text("CANCELLED")
        self.signal(job, signal.SIGTERM)

    def signal(self, job: dict, number: int) -> None:
        """Sends a signal to every process of the job's step, as Slurm does."""
        for pid in json.loads((self.folder / f"step-{job['id']}").read_text()):
            os.kill(pid, number)


def sbatch(folder: Path, words: list[str]) -> int:
    """Keeps a job: its options (those of the command line win), its script and the script's arguments."""
    given, rest = parse(words, BATCH)
    script = Path(rest[0])
    lines = script.read_text().splitlines()
    assert lines[0].startswith("#!"), "sbatch: a script begins with #!"
    options: dict[str, str] = {}
    for line in lines[1:]:
        if line.startswith("#SBATCH "):
            found, more = parse(shlex.split(line.removeprefix("#SBATCH "), comments=True), BATCH)
            assert not more, f"sbatch: {line}"
            options |= found
        elif line.strip() and not line.startswith("#"):
            break  # Slurm reads no directive after the first command
    options |= given
    assert Path(options["output"]).parent.is_dir() or "/" not in options["output"], options["output"]
    number = len(list(folder.glob("job-*.json"))) + 1
    (folder / f"script-{number}").write_text("\n".join(lines) + "\n")
    job = {"id": number, "options": options, "arguments": rest[1:]}
    (folder / f"job-{number:03d}.json").write_text(json.dumps(job))
    print(f"Submitted batch job {number}")
    return 0


def srun(folder: Path, words: list[str]) -> int:
    """Starts the tasks of a step; the highest exit code of them, 128 and its number for a signal."""
    options, command = parse(words, STEP)
    each = int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for number in range(int(options.get("n", os.environ["SLURM_NTASKS"]))):
        node, local = divmod(number, each)
        places = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        tasks.append(subprocess.Popen(command, env=os.environ | places, start_new_session=True))
    step = folder / f"step-{os.environ['SLURM_JOB_ID']}"
    step.with_suffix(".new").write_text(json.dumps([task.pid for task in tasks]))
    step.with_suffix(".new").rename(step)
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def scontrol(folder: Path, words: list[str]) -> int:
    """`show hostnames`, `show job` and `requeue`."""
    state = folder / f"state-{words[-1]}"
    if words[:2] == ["show", "hostnames"]:
        print("\n".join(words[2].split(",")))
    elif words[:2] == ["show", "job"]:
        print(f"JobId={words[-1]} JobName=fat5\n   JobState={state.read_text()} Reason=None")
    else:
        assert words[0] == "requeue", words
        state.write_text("REQUEUED")
    return 0


def parse(words: list[str], known: set[str]) -> tuple[dict[str, str], list[str]]:
    """Options in front, in the spellings `--key=value`, `--key value` and `-k value`; and the rest."""
    options: dict[str, str] = {}
    words = list(words)
    while words and words[0].startswith("-"):
        name, equals, value = words.pop(0).lstrip("-").partition("=")
        assert name in known, f"no option {name}"
        if not equals and name not in FLAGS | {"l"}:
            value = words.pop(0)
        options[name] = value
    return options, words


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[2]](Path(sys.argv[1]), sys.argv[3:]))
