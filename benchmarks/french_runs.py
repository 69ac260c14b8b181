"""Runs of french.py as processes of their own: alone or several side by side, stopped in time, their small files kept.

Job      a command line, and the folder that it trains in      Bench    options, folders, and how jobs are run
Card     power and memory of the GPU while a run lasts, by nvidia-smi
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import measure
from fat5.data import read_manifest
from fat5.train.log.metrics import read_rows
from gpu_step import DEVICE, say

GPU = DEVICE.type == "cuda"
GRACE = 90
"""Seconds that a run has to save and leave once it was told to."""
POLL, COLLECT_EVERY = 0.25, 20.0
REHEARSED = 2.0
"""Seconds of training of a rehearsal."""
MOST_ROWS, HEAD = 400, 40
"""Train rows of metrics.jsonl, and lines of predictions.jsonl, that are kept."""
KEPT = ("config.yaml", "summary.json", "results.json", "events.jsonl", "confusion.png", "classes.png", "loss.png")
HERE = Path(__file__).parent
STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes of a run that was told to stop."""
FAT5 = [sys.executable, "-W", "ignore", "-m", "fat5"]


@dataclass
class Job:
    """A run.

    Attributes:
        name: of its folder in the output, and in the work folder, unless `folder` is another one.
        facts: what the results page asks of a run: section, what is varied, seed, start.
        command: without --output_dir, which is the folder.
        after: further commands once it is complete, each with its output in the kept folder.
    """

    name: str
    facts: dict[str, Any]
    command: list[str]
    after: Callable[[Path, Path], list[list[str]]] = lambda folder, kept: []
    environment: dict[str, str] = field(default_factory=dict)


class Bench:
    """What all sections share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.tiny = options, options.tiny
        found = [options.data / name for name in ("shards", "shards-en")]
        self.shards, self.tasks = [folder for folder in found if folder.is_dir()], options.data / "tasks"
        self.work, self.output = options.work, options.output_dir
        self.deadline = 0.0
        manifests = [read_manifest(folder) for folder in self.shards]
        text = {of: sum(getattr(one, of)("train") for one in manifests) for of in ("documents", "tokens")}
        self.stamp = {**measure.stamp(), "device": "GPU" if GPU else "CPU", "training_text": text}
        # Visible cards, each a process's CUDA_VISIBLE_DEVICES; one stand-in without a GPU.
        there = ",".join(map(str, range(torch.cuda.device_count())))
        self.cards = os.environ.get("CUDA_VISIBLE_DEVICES", there).split(",")
        self._collected: dict[str, float] = {}
        self._archiving = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []

    def stop(self) -> None:
        """Ends the runs that are under way: nothing of this command goes on after it."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()

    def left(self) -> float:
        """Seconds that the section has."""
        return self.deadline - time.monotonic()

    def folder(self, name: str) -> Path:
        """Where a run trains."""
        return Path(self.work / name)

    def is_complete(self, name: str) -> bool:
        """Whether a run came to its end, in this call or an earlier one."""
        return (self.output / name / "run.json").is_file() and bool(self.facts(name).get("complete"))

    def facts(self, name: str) -> dict[str, Any]:
        """What run.json of a kept run says; empty where there is none."""
        path = self.output / name / "run.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return found

    def model(self, name: str) -> Path | None:
        """The trained model of a run, for fine-tuning: its folder, while the work folder has it."""
        folder = self.folder(name)
        whole = (folder / "model" / "config.json").is_file()
        return folder if whole or any((folder / "checkpoints").glob("step-*/config.json")) else None

    def run_alone(self, job: Job, *parts: tuple[float, Callable[[Path], list[str]] | None]) -> bool:
        """Runs a job by itself, in parts: each until its end, or until SIGTERM after so many seconds of training,
        counted from its first step, or when the section is over.

        Args:
            parts: seconds, and what the command of the part has behind it, by the run's folder.
        """
        if self.is_complete(job.name):
            say(f"{job.name}: complete already")
            return True
        code = 0
        with Card(self.cards[0]) as card:
            for seconds, more in parts:
                process = self._start(job, more(self.folder(job.name)) if more else [])
                self._watch(process, job, seconds)
                code = process.returncode
                if code not in STOPPED or self.left() <= 0:
                    break
        return self._finish(job, code, card.summary())

    def measure_rate(self, job: Job, seconds: float) -> float:
        """Steps a second of a job, which runs for so long and leaves nothing but warm caches."""
        process = self._start(job, [])
        self._watch(process, job, seconds)
        if process.returncode not in (0, *STOPPED):
            log = (self.output / job.name / "log.txt").read_text(errors="replace")
            raise RuntimeError(f"{job.name}: exit code {process.returncode}: {log[-1500:]}")
        rows = read_rows(self.folder(job.name) / "metrics.jsonl")
        shutil.rmtree(self.folder(job.name))
        shutil.rmtree(self.output / job.name)
        train = [row for row in rows if row["kind"] == "train"]
        return steps_a_second(train)

    def rehearse(self, jobs: Sequence[Job]) -> None:
        """Runs jobs side by side until each has made its first steps; nothing but compiled code is left of them."""

        def rehearsed(job: Job) -> None:
            process = self._start(job, [])
            try:
                self._watch(process, job, REHEARSED)
            finally:  # one that went on would disturb the runs that follow
                process.kill()
            say(f"{job.name}: {'first steps made' if process.wait() in (0, *STOPPED) else 'failed'}")
            shutil.rmtree(self.folder(job.name), ignore_errors=True)
            if process.returncode in (0, *STOPPED):
                shutil.rmtree(self.output / job.name)

        threads = [threading.Thread(target=rehearsed, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def run_together(self, jobs: Sequence[Job], at_once: int) -> None:
        """Runs jobs in their order, so many a card side by side; when time is over none starts, and those that run are
        stopped.
        """
        waiting = [job for job in jobs if not self.is_complete(job.name)]
        finishing: list[threading.Thread] = []
        running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
        used: dict[str, str] = {}
        told = False
        while waiting or running:
            while waiting and len(running) < at_once * len(self.cards) and self.left() > 0:
                job = waiting.pop(0)
                busy = [used[name] for name in running]
                used[job.name] = min(self.cards, key=busy.count)
                running[job.name] = job, self._start(job, [], used[job.name])
            if self.left() <= 0 and not told:
                told = True
                for job in waiting:
                    say(f"{job.name}: not run, out of time")
                waiting = []
                for _, process in running.values():
                    process.send_signal(signal.SIGTERM)
            if self.left() < -GRACE:
                for _, process in running.values():
                    process.kill()
            for name, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    # What comes after a run must not keep others from starting.
                    finishing.append(threading.Thread(target=self._finish, args=(job, process.returncode, {})))
                    finishing[-1].start()
                else:
                    self._collect_at_times(job)
            time.sleep(POLL)
        for thread in finishing:
            thread.join()

    def _start(self, job: Job, more: list[str], card: str | None = None) -> "subprocess.Popen[bytes]":
        """Starts a job, on the first card unless another is named."""
        folder, kept = self.folder(job.name), self.output / job.name
        kept.mkdir(parents=True, exist_ok=True)
        command = [*job.command, *more, "--output_dir", str(folder)]
        with (kept / "command.txt").open("a") as file:
            words = ["fat5", *command[len(FAT5) :]] if command[: len(FAT5)] == FAT5 else ["python", *command[3:]]
            file.write(self._relative(shlex.join(words).replace(f"{HERE}/", "benchmarks/")) + "\n")
        self._write(job, complete=False, started=time.time())
        with (kept / "log.txt").open("ab") as log:
            environment = os.environ | job.environment | {"CUDA_VISIBLE_DEVICES": card or self.cards[0]}
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        self._processes.append(process)
        return process

    def _watch(self, process: "subprocess.Popen[bytes]", job: Job, train_seconds: float) -> None:
        """Waits for a process; SIGTERM once it has trained for so long, or the section is over."""
        metrics = self.folder(job.name) / "metrics.jsonl"
        before, first, told = _size(metrics), 0.0, 0.0
        steps_before = _last_step(metrics)
        while process.poll() is None:
            time.sleep(POLL)
            self._collect_at_times(job)
            now = time.monotonic()
            if not first and _size(metrics) > before and _last_step(metrics) > steps_before:
                first = now
            if not told and (self.left() <= 0 or (first and now - first >= train_seconds)):
                # A run whose last step is made writes its model: it would lose that.
                if job.command[: len(FAT5)] != FAT5 or _last_step(metrics) < _steps(metrics.parent):
                    process.send_signal(signal.SIGTERM)
                told = now
            if told and now - told > GRACE:
                process.kill()
                process.wait()

    def _finish(self, job: Job, code: int, card: dict[str, float]) -> bool:
        """Keeps the files of a run that ended, and says in one line how it went."""
        folder, kept = self.folder(job.name), self.output / job.name
        stopped = code in STOPPED
        if code == 0 or stopped:
            for command in job.after(folder, kept):
                with (kept / "log.txt").open("ab") as log:
                    subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ, check=False)
        self._write(job, complete=code == 0, exit_code=code, ended=time.time(), **card)
        self.collect(job.name)
        say(f"{job.name}: {'stopped in time' if stopped else f'exit code {code}' if code else 'done'}; {line(kept)}")
        if code and not stopped:
            say((kept / "log.txt").read_text(errors="replace")[-1500:])
        return code == 0

    def _write(self, job: Job, **more: Any) -> None:
        facts = {**self.facts(job.name), "name": job.name, **self.stamp, **job.facts, **more}
        text = self._relative(json.dumps(facts, indent=1, ensure_ascii=False))
        (self.output / job.name / "run.json").write_text(text + "\n", encoding="utf-8")

    def _collect_at_times(self, job: Job) -> None:
        now = time.monotonic()
        if now - self._collected.get(job.name, now - COLLECT_EVERY / 2) > COLLECT_EVERY:
            self._collected[job.name] = now
            self.collect(job.name)
        self._collected.setdefault(job.name, now)

    def _relative(self, text: str) -> str:
        """Without the folders of this machine."""
        places = {self.options.data: "data", self.work: "runs", self.output: "results"}
        if self.options.archive is not None:
            places[self.options.archive] = self.options.archive.name
        for place, name in places.items():
            text = text.replace(str(place), name)
        return text

    def collect(self, name: str) -> None:
        """Copies the small files of a run, and of the seeds in it, and writes the archive again."""
        folder, kept = self.folder(name), self.output / name
        for run in (folder, *sorted(folder.glob("seed-*"))):
            target = kept / run.relative_to(folder)
            target.mkdir(parents=True, exist_ok=True)
            for file in (run / name for name in KEPT):
                if file.suffix == ".png" and file.is_file():
                    shutil.copyfile(file, target / file.name)
                elif file.is_file():
                    (target / file.name).write_text(self._relative(file.read_text(encoding="utf-8")), encoding="utf-8")
            if (run / "metrics.jsonl").is_file():
                (target / "metrics.jsonl").write_text(thinned(run / "metrics.jsonl"))
            if (run / "summary.json").is_file():  # complete: its model is enough, of a seed its results
                shutil.rmtree(run / "checkpoints", ignore_errors=True)
                if run != folder:
                    shutil.rmtree(run / "model", ignore_errors=True)
            if (run / "predictions.jsonl").is_file():
                with (run / "predictions.jsonl").open(encoding="utf-8") as file:
                    head = [row for row, _ in zip(file, range(HEAD))]
                (target / "predictions.jsonl").write_text("".join(head), encoding="utf-8")
        if self.options.archive is None:
            return
        with self._archiving:
            partial = self.options.archive.with_suffix(".partial")
            try:
                with tarfile.open(partial, "w:gz") as archive:
                    archive.add(self.output, arcname=".")
            except OSError:  # another thread wrote a file that was being read: the next time has it
                return
            partial.replace(self.options.archive)


class Card:
    """Samples the GPU's power and memory while it is entered; says nothing where nvidia-smi does not."""

    QUERY = ("nvidia-smi", "--query-gpu=power.draw,memory.used", "--format=csv,noheader,nounits", "--loop-ms=500")

    def __init__(self, card: str) -> None:
        self.card = card
        self.samples: list[tuple[float, float, float]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Card":
        if GPU and shutil.which("nvidia-smi"):
            query = [*self.QUERY, f"--id={self.card}"]
            self._process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for text in self._process.stdout:
            try:
                power, memory = map(float, text.split(","))
            except ValueError:  # "[N/A]"
                continue
            self.samples.append((time.monotonic(), power, memory))

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def summary(self) -> dict[str, float]:
        """Energy in watt-hours, mean power in watts, most memory in GiB; empty where nothing was read."""
        if len(self.samples) < 2:
            return {}
        pairs = zip(self.samples, self.samples[1:])
        energy = sum((after[0] - before[0]) * before[1] for before, after in pairs)
        seconds = self.samples[-1][0] - self.samples[0][0]
        most = max(memory for _, _, memory in self.samples)
        return {"energy_wh": energy / 3600, "power_w": energy / seconds, "memory_gib": most / 1024}


def thinned(metrics: Path) -> str:
    """Every evaluation and at most MOST_ROWS train rows, the last one among them. Those of `fat5 pretrain` get
    `trained`: seconds from the end of the first step on, without evaluations and saves.
    """
    rows = read_rows(metrics)
    train = [row for row in rows if row["kind"] == "train"]
    trained = 0.0
    for number, row in enumerate(train):
        if "raw_tokens" in row:
            trained += row["step_tokens"] / row["tokens_per_second"] if number else 0.0
            row["trained"] = trained
    every = -(-len(train) // MOST_ROWS) or 1
    kept = {id(row) for row in [*train[::every], *train[-1:]]}
    chosen = (row for row in rows if row["kind"] == "eval" or id(row) in kept)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)


def line(kept: Path) -> str:
    """A run in one line: steps, losses, rate; or the metrics of a fine-tuned one."""
    if (kept / "results.json").is_file():
        found = json.loads((kept / "results.json").read_text())["metrics"]
        values = {name: score.get("mean", score.get("value")) for name, score in found.items()}
        return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
    if not (kept / "metrics.jsonl").is_file():
        return "no step"
    rows = read_rows(kept / "metrics.jsonl")
    train, scores = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    if not train:
        return "no step"
    told = [f"{train[-1]['step']:,} steps, {train[-1]['tokens'] / 1e6:,.1f}M tokens"]
    told += [f"validation {scores[0]['loss']:.3f} to {scores[-1]['loss']:.3f}"] if scores else []
    return ", ".join([*told, f"{rate(rows):,.0f} tokens/s, {train[-1]['seconds']:.0f} s"])


def rate(rows: Sequence[dict[str, Any]]) -> float:
    """Tokens a second over the second half of the steps, evaluations included."""
    train = [row for row in rows if row["kind"] == "train"]
    first, last = train[len(train) // 2], train[-1]
    if last["seconds"] <= first["seconds"]:
        return float(last["tokens_per_second"])
    return float((last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]))


def steps_a_second(train: Sequence[dict[str, Any]]) -> float:
    """Over the second half of some train rows; 0 where there are too few."""
    if len(train) < 3:
        return 0.0
    middle, last = train[len(train) // 2 - 1], train[-1]
    return float((last["step"] - middle["step"]) / max(last["seconds"] - middle["seconds"], 1e-9))


def _steps(folder: Path) -> float:
    """The steps of a run, by its config.yaml."""
    found = (
        re.search(r"^steps: (\d+)$", (folder / "config.yaml").read_text(), re.M)
        if (folder / "config.yaml").is_file()
        else None
    )
    return int(found[1]) if found else math.inf


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _last_step(metrics: Path) -> int:
    """The step of the last complete row; 0 where there is none."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, _size(metrics) - 8192))
        lines = file.read().split(b"\n")[:-1]
    for text in reversed(lines):
        if b'"kind": "train"' in text:
            try:
                return int(json.loads(text)["step"])
            except ValueError:
                continue
    return 0
