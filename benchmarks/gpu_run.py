"""`fat5 pretrain` on a GPU from shards that were carried along, and the longest contexts that a step can hold."""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from gpu_measure import Results
from gpu_step import DEVICE, Case, Shape, batch, first_step, free, going_on, say, steady, tokens

STARTING = 120
"""Seconds until a run's first step: two compilations, of the step and of the evaluation."""
GRACE = 60
"""Seconds a run gets to end by itself after it was told to."""


def long(results: Results, options: argparse.Namespace) -> None:
    """One document of 8,192, 32,768 and 65,536 tokens on both sides; gradient checkpointing only where it must."""
    preset = "fat5-demo" if options.toy else options.stock_preset
    for length in (128, 256) if options.toy else (8192, 32768, 65536):
        with going_on(out_of_memory=True):
            for checkpointing in (False, True):
                if results.elapsed() > options.seconds:
                    say(f"{length}: not run, out of time")
                    return
                try:
                    _context(results, options, preset, length, checkpointing)
                    break
                except torch.cuda.OutOfMemoryError:
                    say(f"{preset} {length:,}: out of memory, checkpointing {checkpointing}")
                free()
        free()


def _context(results: Results, options: argparse.Namespace, preset: str, length: int, checkpointing: bool) -> None:
    case = Case.of(
        preset,
        precision=options.precision,
        optimizer=options.optimizer,
        compiled=options.long_compiled,
        checkpointing=checkpointing,
    )
    shape = Shape(length, length, 1, length)
    batches = [batch(shape, [(length, length)], seed) for seed in range(4)]
    first, loss = first_step(case, batches[0])
    timing = steady(lambda n: case.step(n, batches[n % 4]), options.measured)
    rate, mfu = tokens(batches[0]) / timing.seconds, case.flops(batches[0]) / timing.seconds / case.peak()
    memory, name = timing.memory / 2**30, f"{preset} context {length}"
    provider = "fat5 compiled" if options.long_compiled else "fat5 eager"
    provider += ", checkpointing" if checkpointing else ""
    results.add(name, provider, "useful tokens/s", rate, "tokens/s")
    results.add(name, provider, "MFU", mfu, "ratio")
    results.add(name, provider, "peak memory", memory, "GiB")
    results.write()
    say(
        f"{name} {provider}: {np.median(rate):,.0f} tokens/s, MFU {np.median(mfu):.1%}, step "
        f"{np.median(timing.seconds):.2f} s, peak {memory:.1f} GiB, first step {first:.1f} s, loss {loss:.3f}"
    )


def pretrain(results: Results, options: argparse.Namespace) -> None:
    """The base preset for a while, then a few steps in fp16 with loss scaling, through the command line."""
    preset = "fat5-demo" if options.toy else options.stock_preset
    seconds = min(options.run_seconds, options.seconds - results.elapsed())
    steps = options.run_steps or (6 if options.toy else 0)
    _run(results, options, f"pretrain {preset}", preset, "auto", seconds, steps)
    with going_on():
        if results.elapsed() < options.seconds:
            _run(results, options, "pretrain fp16", "fat5-demo", "fp16", 120, 6 if options.toy else 150)


def _run(
    results: Results, options: argparse.Namespace, name: str, preset: str, precision: str, seconds: float, steps: int
) -> None:
    """One run in a process of its own, told to stop when its time is over; its folder keeps log and plot."""
    folder = results.path.parent / name.replace(" ", "-")
    work = Path("/tmp") / f"fat5-{folder.name}"
    for old in (folder, work):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True)
    config = _config(options, work, preset, precision if DEVICE.type == "cuda" else "fp32", steps)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "fat5", "pretrain", "--config", str(folder / "config.yaml")]
    started = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    for file in ("metrics.jsonl", "loss.png", "summary.json", "events.jsonl"):
        if (work / file).exists():
            shutil.copyfile(work / file, folder / file)
    say(f"{name}: exit code {process.returncode} after {time.perf_counter() - started:.0f} s")
    if process.returncode not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
        say((folder / "log.txt").read_text()[-2000:])
    _report(results, name, folder / "metrics.jsonl")


def _config(options: argparse.Namespace, work: Path, preset: str, precision: str, steps: int) -> dict[str, Any]:
    toy = options.toy
    encoder, decoder, packs = (1024, 768, 1) if toy else (16384, 11776, 4)
    planned = steps or int((options.run_seconds - STARTING) * options.run_rate / (packs * (encoder + decoder)))
    return {
        "output_dir": str(work),
        "model": {"preset": preset, "overrides": {"dropout_rate": 0.1, "z_loss": 1e-4}},
        "data": {
            "sources": [{"path": str(options.shards)}],
            "max_tokens": 256 if toy else 1024,
            "encoder_tokens": encoder,
            "decoder_tokens": decoder,
            "packs_per_step": packs,
            "packs_per_micro_batch": 1 if toy else 2,
            "num_workers": 0 if toy else 4,
        },
        "optimizer": {"name": options.optimizer},
        "schedule": {"name": "cosine", "warmup_steps": max(1, planned // 20), "final_factor": 0.05},
        "steps": planned,
        "precision": precision,
        "eval_every": max(1, planned // 20),
        "eval_tokens": 2048 if toy else 13000,
        "save_every": planned,
    }


def _report(results: Results, name: str, metrics: Path) -> None:
    """What the run's own log says: the record of truth."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    if not train:
        say(f"{name}: made no step before it was stopped")
        return
    scores = [row for row in rows if row["kind"] != "train" and row.get("loss") is not None]
    later = train[len(train) // 5 :]
    for key, unit in (("tokens_per_second", "tokens/s"), ("mfu", "ratio"), ("data_wait_fraction", "ratio")):
        values = np.array([row[key] for row in later if row.get(key) is not None])
        if values.size:
            results.add(name, "fat5 pretrain", key, values, unit)
            say(f"{name} {key}: median {np.median(values):,.4g}")
    results.add(name, "fat5 pretrain", "steps", float(len(train)), "")
    for label, row in (("first", scores[0]), ("last", scores[-1]), ("best", min(scores, key=lambda row: row["loss"]))):
        results.add(name, "fat5 pretrain", f"validation loss, {label}", row["loss"], "nats/token")
        say(f"{name}: {label} validation loss {row['loss']:.3f} at step {row['step']}")
    scales = [row["loss_scale"] for row in train if "loss_scale" in row]
    skipped = sum(bool(row.get("skipped")) for row in train)
    say(
        f"{name}: {len(train)} steps, last train loss {train[-1]['loss']}, {skipped} skipped, loss scales {scales[-3:]}"
    )
    results.write()
