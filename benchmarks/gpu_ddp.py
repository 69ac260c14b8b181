"""Many GPUs of one host against one: tokens/s, losses of the same global batch, and runs whose processes are killed.

    python benchmarks/gpu_shards.py SHARDS                     (on any machine, before)
    python benchmarks/gpu_ddp.py SHARDS --output_dir DIR [--sections alone scaling same kill elastic] [--devices 4]
        [--preset fat5-base] [--parallel ddp fsdp]

Runs unattended, one run after another, each by the command that a user types, in bf16, compiled, with CUDA graphs, by
each way of `--parallel`.

alone       one card; scaling and same take that run, if it lies in --work, in place of one of their own
scaling     1, 2, 4, … cards with the same work a card: tokens/s, efficiency against one card
same        all cards with the global batch of one card, whose losses they must have
all three   also memory, and the share of NCCL's kernels in three steps of the first and the last rank
kill        a smaller preset with dropout, twice: undisturbed, and with SIGKILL of the last rank after the first
            checkpoint and the same command again; weights, optimizer and generators are compared byte by byte
elastic     SIGKILL on all cards, again on half of them, and the end on one card, against one run without dropout that
            nothing disturbs: the same examples in the same order, the same losses

`--tiny` runs the same without a GPU. Every figure is printed, and written to OUTPUT_DIR/ddp.csv at once.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from fat5.train import read_rows
from gpu_measure import Results
from gpu_step import say

STATE = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "rng-{last}.safetensors")
BUDGETS = (16384, 11776)
"""Encoder and decoder tokens of a pack."""
PACKS = 4
"""Of a step on one card."""
WARM = 0.3
"""Share of a run's first steps that does not count: compilation, recording, a clock that still rises."""
LOSS = {"bf16": 5e-3, "fp32": 1e-5}
"""Largest relative difference of a step's loss: sums in another order, rounded to the precision's matrix products."""
SECONDS_TO_END = 60.0
TINY = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sections", nargs="*", choices=list(SECTIONS), default=["scaling", "same", "kill"])
    parser.add_argument("--parallel", nargs="*", choices=["ddp", "fsdp", "hsdp"], default=["ddp"])
    parser.add_argument("--hsdp_shard_size", type=int)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--preset", default="fat5-base")
    parser.add_argument("--kill_preset", default="fat5-demo")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=570.0, help="a run that lasts longer than what is left ends")
    parser.add_argument("--work", type=Path, default=Path("/tmp/fat5-ddp"), help="runs")
    parser.add_argument("--no_cuda_graphs", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="packs of 256 tokens, width 32: a try without a GPU")
    options = parser.parse_args()
    if options.tiny:
        options.preset = options.kill_preset = "fat5-demo"
    results = Results(options.output_dir, "ddp")
    good = [SECTIONS[name](options, results) for name in options.sections]
    results.write()
    sys.exit(0 if all(good) else 1)


class Run:
    """One run of the command in processes of its own, on some cards."""

    def __init__(
        self,
        options: argparse.Namespace,
        results: Results,
        name: str,
        devices: int,
        keep: bool = False,
        **changes: object,
    ) -> None:
        self.options, self.results, self.name, self.devices = options, results, name, devices
        folder = options.work / name.replace(" ", "-")
        self.run, self.log, self.recipe = folder / "run", folder / "log.txt", folder / "recipe.yaml"
        self.folder, self.profiled = folder, False
        recipe = yaml.safe_dump(recipe_of(options, **changes) | {"output_dir": str(self.run)})
        if not (keep and self.recipe.is_file() and self.recipe.read_text() == recipe):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.recipe.write_text(recipe)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Run":
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.devices)]
        entry = [str(Path(__file__).with_name("gpu_rank.py")), "pretrain", "--config"]
        command = [sys.executable, *(many if self.devices > 1 else []), *entry]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "NOTES": str(self.folder)}
        if self.profiled:
            environment["PROFILE"] = str(self.options.steps - 3)
        environment.setdefault("OMP_NUM_THREADS", "1" if self.options.tiny else "4")
        if self.devices == 1:
            environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
        with self.log.open("a") as log:
            self.process = subprocess.Popen([*command, str(self.recipe)], env=environment, stdout=log, stderr=log)
        return self

    def wait(self) -> int:
        """The exit code; a run that is late is stopped."""
        assert self.process is not None
        try:
            code = self.process.wait(max(1.0, self.options.seconds - self.results.elapsed()))
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)
            code = self.process.wait()
            say(f"{self.name}: out of time")
        if code:
            say(f"{self.name}: exit code {code}\n" + self.log.read_text()[-3000:])
        return code

    def kill_last_rank(self, step: int) -> tuple[int, float]:
        """SIGKILL of the last rank behind a step; the launcher's exit code, and seconds until all had ended."""
        assert self.process is not None
        while self.step() < step and self.process.poll() is None:
            time.sleep(0.02)
        everyone = _children(self.process.pid)
        victims = [pid for pid in everyone if f"RANK={self.devices - 1}" in _environment(pid)]
        if self.devices == 1:  # no launcher
            victims = [self.process.pid]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        killed = time.perf_counter()
        code = self.process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in everyone) and time.perf_counter() < killed + 120:
            time.sleep(0.05)
        return code, time.perf_counter() - killed

    def step(self) -> int:
        log = self.run / "metrics.jsonl"
        return max((row["step"] for row in read_rows(log)), default=0) if log.exists() else 0

    def steps(self) -> list[dict]:
        return [row for row in read_rows(self.run / "metrics.jsonl") if row["kind"] == "train"]

    def digests(self) -> dict[str, str]:
        folder = self.run / "checkpoints" / f"step-{self.options.steps}"
        names = [name.format(last=self.devices - 1) for name in STATE]
        return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}

    def report(self) -> float:
        """Median tokens/s after the first steps, printed and kept with MFU and the share of waiting for data."""
        later = self.steps()[int(WARM * self.options.steps) :]
        later = later[:-4] if self.profiled else later
        for key, unit in (("tokens_per_second", "tokens/s"), ("mfu", "ratio"), ("data_wait_fraction", "ratio")):
            values = np.array([row[key] for row in later if row.get(key) is not None])
            if values.size:
                self.results.add(self.name, "fat5 pretrain", key, values, unit)
                say(f"{self.name} {key}: median {np.median(values):,.4g}")
        notes = [json.loads((self.folder / f"rank-{rank}.json").read_text()) for rank in range(self.devices)]
        for kind in ("allocated", "reserved"):
            self.tell(f"most memory {kind} on a card", np.array([one[kind] / 2**30 for one in notes]), "GiB")
        for rank in sorted({0, self.devices - 1}):
            for kernels, milliseconds in notes[rank].get("step", {}).items():
                self.tell(f"rank {rank}: {kernels} in a step", milliseconds, "ms")
        self.results.write()
        return float(np.median([row["tokens_per_second"] for row in later]))

    def tell(self, metric: str, values: "np.ndarray | float", unit: str) -> None:
        """Prints a figure and keeps it."""
        self.results.add(self.name, "fat5 pretrain", metric, values, unit)
        say(f"{self.name} {metric}: " + ", ".join(f"{value:.4g}" for value in np.atleast_1d(values)) + f" {unit}")

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.steps()]

    def data_state(self) -> dict:
        """Where the stream of examples stands at the end, and which wait."""
        folder = self.run / "checkpoints" / f"step-{self.options.steps}"
        state = json.loads((folder / "trainer.json").read_text())["data"]
        return {key: state[key] for key in ("step", "cursor", "window")}


def recipe_of(
    options: argparse.Namespace,
    *,
    packs: int,
    preset: str | None = None,
    dropout: float = 0.0,
    saves: int = 1,
    parallel: str = "ddp",
) -> dict:
    encoder, decoder = (256, 256) if options.tiny else BUDGETS
    overrides = {"dropout_rate": dropout, "z_loss": 1e-4} | (TINY if options.tiny else {})
    gpu = torch.cuda.is_available()
    return {
        "model": {"preset": preset or options.preset, "overrides": overrides},
        "data": {
            "sources": [{"path": str(options.shards)}],
            "max_tokens": 64 if options.tiny else 1024,
            "encoder_tokens": encoder,
            "decoder_tokens": decoder,
            "packs_per_step": packs,
            "packs_per_micro_batch": 1,
            "num_workers": 4 if gpu else 0,
        },
        "schedule": {"name": "cosine", "warmup_steps": max(1, options.steps // 10)},
        "steps": options.steps,
        "precision": "bf16" if gpu else "fp32",
        "compile": gpu,
        "cuda_graphs": "auto" if gpu and not options.no_cuda_graphs else False,
        "eval_every": options.steps,
        "eval_tokens": 256 if options.tiny else 13000,
        "save_every": max(1, options.steps // saves),
        "keep_last": 1,
        "parallel": parallel,
    } | ({"hsdp_shard_size": options.hsdp_shard_size} if parallel == "hsdp" else {})


def one_card(options: argparse.Namespace, results: Results, packs: int = PACKS) -> "tuple[Run, float] | None":
    """The run on one card, made or found with the same recipe in the work folder, and its tokens/s; nothing if it
    failed.
    """
    name = f"{options.preset} one card" + ("" if packs == PACKS else f", {packs} packs")
    run = Run(options, results, name, 1, keep=True, packs=packs)
    run.profiled = True
    if not (run.run / "summary.json").is_file() and run.start().wait():
        return None
    return run, run.report()


def alone(options: argparse.Namespace, results: Results) -> bool:
    """Whether the run on one card ended."""
    return one_card(options, results) is not None


def scaling(options: argparse.Namespace, results: Results) -> bool:
    """Whether all runs ended; how much faster more cards are is printed."""
    one = one_card(options, results)
    good, cards = one is not None, 2
    while cards <= options.devices:
        for parallel in options.parallel:
            name = f"{options.preset} {cards} cards, {parallel}"
            run = Run(options, results, name, cards, packs=PACKS * cards, parallel=parallel)
            run.profiled = True
            if run.start().wait():
                good = False
                continue
            rate = run.report()
            if one is not None:
                run.tell("times the tokens/s of one card", rate / one[1], "ratio")
                run.tell("efficiency", rate / one[1] / cards, "ratio")
        cards *= 2
    results.write()
    return good


def same(options: argparse.Namespace, results: Results) -> bool:
    """Whether all cards learn what one does; how much faster they are is printed."""
    cards, packs = options.devices, max(PACKS, options.devices)
    one = one_card(options, results, packs)
    good = one is not None
    for parallel in options.parallel:
        name = f"{options.preset} {cards} cards, same batch, {parallel}"
        run = Run(options, results, name, cards, packs=packs, parallel=parallel)
        run.profiled = True
        if run.start().wait():
            good = False
            continue
        rate = run.report()
        if one is not None:
            run.tell("times the tokens/s of one card", rate / one[1], "ratio")
            good &= compare(run.name, run.losses(), one[0].losses(), results)
    results.write()
    return good


def compare(name: str, losses: list[float], reference: list[float], results: Results) -> bool:
    """Whether two runs have the same losses within the tolerance; the difference is printed and kept."""
    apart = np.abs(np.array(losses) / np.array(reference) - 1)
    results.add(name, "fat5 pretrain", "relative difference of the losses", apart, "ratio")
    say(f"{name}: losses differ by {apart.max():.2g} at most, relative (median {np.median(apart):.2g})")
    return bool(apart.max() <= LOSS["bf16" if torch.cuda.is_available() else "fp32"])


def kill(options: argparse.Namespace, results: Results) -> bool:
    """Whether all ranks end when one is killed, and the continued run has the bytes of the undisturbed one."""
    good = True
    for parallel in options.parallel:
        keys = {"preset": options.kill_preset, "packs": 2 * options.devices, "dropout": 0.1, "saves": 4}
        clean, killed = (
            Run(options, results, f"kill, {parallel}, {name}", options.devices, parallel=parallel, **keys)
            for name in ("clean", "killed")
        )
        if clean.start().wait():
            return False
        good &= end_by_kill(killed.start(), options.steps * 3 // 8)
        if killed.start().wait():
            return False
        first, second = clean.digests(), killed.digests()
        equal = [name for name in first if first[name] == second[name]]
        killed.tell("parts of the state equal", len(equal), f"of {len(first)}")
        good &= len(equal) == len(first)
    return good


def elastic(options: argparse.Namespace, results: Results) -> bool:
    """Whether a run that is killed twice, and continued on half of the cards and on one, is the undisturbed one."""
    good = True
    for parallel in options.parallel:
        keys = {"preset": options.kill_preset, "packs": 2 * options.devices, "saves": 6, "parallel": parallel}
        clean, moved = (
            Run(options, results, f"elastic, {parallel}, {name}", options.devices, **keys)
            for name in ("clean", "moved")
        )
        if clean.start().wait():
            return False
        for devices, step in (
            (options.devices, options.steps // 4),
            (max(1, options.devices // 2), options.steps * 5 // 8),
        ):
            moved.devices = devices
            good &= end_by_kill(moved.start(), step)
        moved.devices = 1
        if moved.start().wait():
            return False
        used, reference = moved.data_state(), clean.data_state()
        moved.tell("examples and their order equal", float(used == reference), "1 = yes")
        good &= used == reference and compare(moved.name, moved.losses(), clean.losses(), results)
    return good


def end_by_kill(run: "Run", step: int) -> bool:
    """Whether all processes have ended soon, and not with 0, after a SIGKILL of the last rank behind a step."""
    code, seconds = run.kill_last_rank(step)
    say(f"{run.name}: killed at step {run.step()} on {run.devices} cards, exit code {code}")
    run.tell(f"until all have ended, {run.devices} cards", seconds, "s")
    return code != 0 and seconds < SECONDS_TO_END


SECTIONS = {"alone": alone, "scaling": scaling, "same": same, "kill": kill, "elastic": elastic}


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")


if __name__ == "__main__":
    main()
