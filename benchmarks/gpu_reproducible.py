"""Does a compiled run on this GPU give the same bytes twice, and after a kill? And what does that cost?

    python benchmarks/gpu_shards.py SHARDS                     (on any machine, before)
    python benchmarks/gpu_reproducible.py SHARDS --output_dir DIR [--presets fat5-demo fat5-small] [--cost fat5-base]

For each preset, three runs of one recipe, each with compiler caches of its own: two from start to end, and one that is
killed (SIGKILL) after its first checkpoint and started again. Weights, optimizer, generators and log are compared byte
by byte. `--before PRESET` adds two runs with the former code (gradients by atomics, reductions chosen by timing).
The cost is the time of a training step in the former form and in today's, in turn on one card; it compiles while the
runs go on, and is timed when they have ended.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml

from fat5.model.layers import Embedding
from fat5.train import read_rows
from fat5.train.log.metrics import TIMES
from gpu_measure import Results
from gpu_step import Case, Shape, batch, documents, first_step, free, say, steady

STATE = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")
BUDGETS = (8192, 5888)
"""Encoder and decoder tokens of a pack: half of the usual ones, since up to nine runs share the card."""

TINY = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--presets", nargs="*", default=["fat5-demo", "fat5-small"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--work", type=Path, default=Path("/tmp/fat5-reproducible"), help="runs and compiler caches")
    parser.add_argument("--before", nargs="*", default=[], help="presets with two runs of the former code as well")
    parser.add_argument("--deterministic", nargs="*", default=[], help="presets with a run of deterministic: true too")
    parser.add_argument("--cost", nargs="*", default=[], help="presets whose step is timed")
    parser.add_argument("--seconds", type=float, default=6.0, help="timed seconds of each form of a step")
    parser.add_argument("--tiny", action="store_true", help="packs of 256 tokens, width 32: a try without a GPU")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        form, *arguments = options.child
        with former(form == "before"):
            from fat5.cli.main import main as command

            sys.exit(command(arguments))
    results = Results(options.output_dir, "reproducible")
    with ThreadPoolExecutor(1) as aside:
        comparison = aside.submit(compare, options, results)
        for preset in options.cost:
            cases = compiled_cases(options, preset)
            comparison.result()
            cost(options, results, preset, cases)
        same = comparison.result()
    results.write()
    sys.exit(0 if same else 1)


@contextmanager
def former(wanted: bool) -> Iterator[None]:
    """Inside, if wanted, the code before the mend: gradients by atomics, reductions chosen by timing."""
    compile_now, forward_now = torch.compile, Embedding.forward
    if wanted:
        Embedding.forward = lambda self, ids: F.embedding(ids, self.weight)  # type: ignore[method-assign]
        torch.compile = lambda *args, **how: compile_now(*args, **(how | {"options": None}))  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile, Embedding.forward = compile_now, forward_now  # type: ignore[assignment, method-assign]


class Run:
    """One run in processes of its own."""

    def __init__(self, options: argparse.Namespace, preset: str, name: str, form: str = "now", **keys: object) -> None:
        self.name, self.form, self.options = f"{preset}, {name}", form, options
        self.folder = options.work / f"{preset}-{name}".replace(" ", "-")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.run = self.folder / "run"
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(recipe_of(options, preset) | {"output_dir": str(self.run)} | keys))
        self.command = [sys.executable, __file__, str(options.shards), "--output_dir", str(options.output_dir)]
        self.command += ["--child", form, "pretrain", "--config", str(recipe)]
        self.start()

    def start(self) -> None:
        caches = {f"{name}_CACHE_DIR": str(self.folder / name) for name in ("TORCHINDUCTOR", "TRITON")}
        environment = (
            os.environ
            | caches
            | {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
        )
        with (self.folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(self.command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def step(self) -> int:
        log = self.run / "metrics.jsonl"
        return max((row["step"] for row in read_rows(log)), default=0) if log.exists() else 0

    def kill(self, step: int) -> None:
        """Kills the run behind `step`, and starts it again with empty compiler caches."""
        while self.step() < step and self.process.poll() is None:
            time.sleep(0.02)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        reached = self.step()
        for cache in ("TORCHINDUCTOR", "TRITON"):
            shutil.rmtree(self.folder / cache, ignore_errors=True)
        self.start()
        say(f"{self.name}: killed at step {reached}, started again")

    def wait(self) -> bool:
        code = self.process.wait()
        if code:
            say(f"{self.name}: exit code {code}\n" + (self.folder / "log.txt").read_text()[-1500:])
        return code == 0

    def digests(self) -> dict[str, str]:
        """SHA-256 of each part of the state, and of the log without its times."""
        last = self.run / "checkpoints" / f"step-{self.options.steps}"
        found = {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in STATE}
        rows = [{key: value for key, value in row.items() if key not in TIMES} for row in self.rows()]
        found["metrics.jsonl"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        found["exported model"] = hashlib.sha256((self.run / "model/model.safetensors").read_bytes()).hexdigest()
        return found

    def rows(self) -> list[dict]:
        return list(read_rows(self.run / "metrics.jsonl"))


def recipe_of(options: argparse.Namespace, preset: str) -> dict:
    encoder, decoder = (256, 256) if options.tiny else BUDGETS
    overrides = {"dropout_rate": options.dropout, "z_loss": 1e-4} | (TINY if options.tiny else {})
    return {
        "model": {"preset": preset, "overrides": overrides},
        "data": {
            "sources": [{"path": str(options.shards)}],
            "max_tokens": 64 if options.tiny else 1024,
            "encoder_tokens": encoder,
            "decoder_tokens": decoder,
            "packs_per_step": 2,
            "num_workers": 2,
        },
        "schedule": {"name": "cosine", "warmup_steps": options.steps // 10},
        "steps": options.steps,
        "compile": torch.cuda.is_available(),
        "eval_every": options.steps // 4,
        "eval_tokens": 256 if options.tiny else 13000,
        "save_every": options.steps // 4,
    }


def compare(options: argparse.Namespace, results: Results) -> bool:
    """Whether all runs of a preset that should give the same bytes do."""
    same, runs = True, {}
    for preset in options.presets:
        runs[preset] = [Run(options, preset, name) for name in ("first", "second", "killed")]
        if preset in options.before:
            runs[preset] += [Run(options, preset, f"before {n}", "before") for n in (1, 2)]
        if preset in options.deterministic:
            runs[preset].append(Run(options, preset, "deterministic", deterministic=True))
    for preset in options.presets:
        runs[preset][2].kill(options.steps // 4 + options.steps // 8)
    for preset, started in runs.items():
        ended = [run.wait() for run in started]
        results.write()
        if not all(ended[:3]):
            same = False
            continue
        first = started[0].digests()
        for run, whole in zip(started[1:], ended[1:], strict=True):
            if not whole:
                continue
            other = run.digests()
            equal = [name for name in first if other[name] == first[name]]
            expected = run.form == "now" and "deterministic" not in run.name
            same &= len(equal) == len(first) or not expected
            results.add(run.name, "fat5 compiled", "parts of the state equal to the first run", len(equal), "of 5")
            say(f"{run.name}: equal to the first run in {', '.join(equal) or 'nothing'} ({len(equal)} of {len(first)})")
        pair = [run.digests() for run, whole in zip(started, ended, strict=True) if run.form == "before" and whole]
        if len(pair) == 2:
            equal = [name for name in pair[0] if pair[0][name] == pair[1][name]]
            say(f"{preset}, before: its two runs are equal in {', '.join(equal) or 'nothing'}")
            results.add(f"{preset}, before", "fat5 compiled", "parts equal in two runs", len(equal), "of 5")
        for run in started:
            losses = [row["loss"] for row in run.rows() if row["kind"] == "train"]
            say(f"{run.name}: last losses {losses[-2:]}")
    return same


def compiled_cases(options: argparse.Namespace, preset: str) -> dict[str, Case]:
    """A step in the former form and in today's, compiled."""
    shape, cases = shape_of(options), {}
    for name in ("before", "now"):
        with former(name == "before"):
            cases[name] = Case.of(preset)
            taken, _ = first_step(cases[name], batch(shape, documents(shape, None, 0), 0))
        say(f"{preset} {name}: first step {taken:.0f} s")
        torch._dynamo.reset()
    return cases


def shape_of(options: argparse.Namespace) -> Shape:
    return Shape.of(256 if options.tiny else BUDGETS[0], 128 if options.tiny else 1024)


def cost(options: argparse.Namespace, results: Results, preset: str, cases: dict[str, Case]) -> None:
    """Milliseconds of a step in each form, in turn, three times."""
    shape = shape_of(options)
    batches = [batch(shape, documents(shape, None, seed), seed) for seed in range(4)]
    taken: dict[str, list[np.ndarray]] = {name: [] for name in cases}
    for _ in range(3):
        for name, case in cases.items():
            timing = steady(lambda n, c=case: c.step(n, batches[n % 4]), options.seconds / 3)  # type: ignore[misc]
            taken[name].append(timing.seconds)
    before = np.median(np.concatenate(taken["before"]))
    for name, samples in taken.items():
        seconds = np.concatenate(samples)
        results.add(f"{preset} step", name, "step", seconds, "s")
        results.add(f"{preset} step", name, "over before", seconds / before, "ratio")
        say(f"{preset} {name}: {np.median(seconds) * 1e3:.2f} ms a step, {np.median(seconds) / before:.4f} of before")
    results.write()
    cases.clear()
    free()


if __name__ == "__main__":
    main()
