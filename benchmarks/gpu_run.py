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

from fat5.data import BatchConfig
from fat5.train.cost.memory import plan_memory
from fat5.train.world import World
from gpu_measure import Results
from gpu_step import DEVICE, Case, Shape, batch, first_step, free, going_on, say, synchronize, tokens

STARTING = 120
"""Seconds until a run's first step: two compilations, of the step and of the evaluation."""
GRACE = 60
"""Seconds a run gets to end by itself after it was told to."""


def long(results: Results, options: argparse.Namespace) -> None:
    """One document of each length on both sides, under each policy of checkpointing, beside the memory plan."""
    preset = "fat5-demo" if options.toy else options.stock_preset
    lengths = "128,256" if options.toy else options.long_lengths
    for length in map(int, lengths.split(",")):
        for policy in options.long_policies.split(","):
            if results.elapsed() > options.seconds:
                say(f"{length:,} {policy}: not run, out of time")
                return
            with going_on():
                try:
                    _context(results, options, preset, length, policy)
                except torch.cuda.OutOfMemoryError:
                    say(f"{preset} {length:,}, checkpointing {policy}: out of memory")
            free()


def _context(results: Results, options: argparse.Namespace, preset: str, length: int, policy: str) -> None:
    case = Case.of(
        preset,
        precision=options.precision,
        optimizer=options.optimizer,
        compiled=options.long_compiled,
        checkpointing=policy,
        cuda_graphs=False,  # a step takes seconds: launches are not what it waits for
        offload=options.offload,
    )
    shapes = BatchConfig(length, length, length, packs_per_step=1, max_examples=1)
    plan = plan_memory(case.config, shapes, case.model, World(DEVICE))
    name = f"{preset} context {length}"
    provider = "fat5 compiled" if options.long_compiled else "fat5 eager"
    provider += ("" if policy == "none" else f", checkpointing {policy}") + (", offload" if options.offload else "")
    provider += f", {options.memory} GiB" if options.memory else ""
    results.add(name, provider, "planned memory", plan.total / 2**30, "GiB")
    say(f"{name} {provider}: planned {plan.describe()}")
    if DEVICE.type == "cuda" and options.memory:
        whole = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory * 2**30 / whole))
    # Kernels are compiled at a short length, unless the whole step is, at its own.
    small = length if options.long_compiled else min(length, 1024)
    shape, warm = Shape(length, length, 1, length), Shape(small, small, 1, small)
    first, loss = first_step(case, batch(warm, [(small, small)], 0))
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < options.measured and len(taken) < 20):
        packed = batch(shape, [(length, length)], 1 + len(taken))
        began = time.perf_counter()
        loss, _, _ = case.step(1 + len(taken), packed).read()
        synchronize()
        taken.append(time.perf_counter() - began)
    seconds = np.array(taken)
    rate, mfu = tokens(packed) / seconds, case.flops(packed) / seconds / case.peak()
    memory = torch.cuda.max_memory_reserved() / 2**30 if DEVICE.type == "cuda" else 0.0
    results.add(name, provider, "useful tokens/s", rate, "tokens/s")
    results.add(name, provider, "MFU", mfu, "ratio")
    results.add(name, provider, "peak memory", memory, "GiB")
    results.write()
    steps = ", ".join(f"{one:.2f}" for one in taken)
    say(
        f"{name} {provider}: {np.median(rate):,.0f} tokens/s, MFU {np.median(mfu):.1%}, steps {steps} s, "
        f"peak {memory:.1f} GiB, first step {first:.1f} s, loss {loss:.3f}"
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
