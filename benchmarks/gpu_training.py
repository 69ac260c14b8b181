"""Training on a GPU: the trainer's own step by preset, tokens/s, MFU, peak memory, and where the time goes.

    PYTHONPATH=src python3 benchmarks/gpu_training.py --output_dir results [--sections profile,eager] [--seconds 500]

Runs unattended: a section that fails prints its traceback and the next one goes on; every figure is printed and written
to OUTPUT_DIR/gpu_training.csv at once, the kernels of a step to OUTPUT_DIR/profile.txt. `--toy` runs the same code at a
size that a CPU can do. A useful token is an encoder token of a document or a target. MFU holds the operations of
`fat5.train.cost.flops` against the dense bf16 peak of the data sheet.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gpu_accelerate import accelerated
from gpu_measure import Results
from gpu_products import products
from gpu_profile import IDLE, Profile, profile_step
from gpu_run import long, pretrain
from gpu_step import (
    DEVICE,
    Case,
    Shape,
    batch,
    documents,
    first_step,
    free,
    going_on,
    say,
    steady,
    synchronize,
    tokens,
    turn,
)
from gpu_stock import decode, encoder, hf

MIXED = {"512": 512, "1024": None}
"""Name of a mix of documents, and the length of all of them; None draws lengths from 50 to 1,024."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sections", default="profile", help=f"which, in order: {', '.join(SECTIONS)}")
    parser.add_argument("--presets", default="fat5-small,fat5-base,fat5-large")
    parser.add_argument("--seconds", type=float, default=500.0, help="nothing new starts after this")
    parser.add_argument("--measured", type=float, default=5.0, help="seconds of steady steps a figure")
    parser.add_argument("--tokens", type=int, default=32768, help="encoder and decoder budget; halved until it fits")
    parser.add_argument("--examples", type=int, help="most documents of a micro-batch; a sixteenth of its tokens")
    parser.add_argument("--optimizer", default="adamw_scale")
    parser.add_argument(
        "--precision", default="auto", help="auto, bf16, bf16-pure, fp16 or fp32, as in `fat5 pretrain`"
    )
    parser.add_argument("--no_cuda_graphs", action="store_true", help="launch a compiled step's kernels one by one")
    parser.add_argument("--stock_preset", default="fat5-base", help="preset of the sections hf, long and pretrain")
    parser.add_argument("--stock_rows", type=int, default=32, help="hf: rows of a padded batch; halved until it fits")
    parser.add_argument("--stock_eager", action="store_true", help="hf, encoder: compile neither side")
    parser.add_argument("--long_lengths", default="65536,131072", help="long: tokens of the one document, each side")
    parser.add_argument("--long_policies", default="none,selective,block", help="long: gradient checkpointing")
    parser.add_argument("--long_compiled", action="store_true", help="long: compile, once for each length and policy")
    parser.add_argument("--memory", type=float, help="long: GiB that PyTorch may take, to stand for a smaller card")
    parser.add_argument("--offload", action="store_true", help="long: the optimizer's state in the host's memory")
    parser.add_argument("--shards", type=Path, default=Path(".whl/data/shards"), help="pretrain: from gpu_shards.py")
    parser.add_argument("--run_seconds", type=float, default=300.0, help="pretrain: stopped after this")
    parser.add_argument(
        "--run_rate", type=float, default=250e3, help="pretrain: tokens/s that its steps are planned by"
    )
    parser.add_argument("--run_steps", type=int, help="pretrain: steps of the run, instead of run_rate")
    parser.add_argument(
        "--turn", type=Path, help="a file to lock while steps are timed: processes may then compile side by side"
    )
    parser.add_argument("--toy", action="store_true", help="the demo preset at a few hundred tokens")
    options = parser.parse_args()
    if options.toy:
        options.presets, options.tokens, options.measured, options.stock_rows = "fat5-demo", 256, 0.5, 2
    results = Results(options.output_dir, "gpu_training")
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    say(f"{device}, torch {torch.__version__}, python {sys.version.split()[0]}")
    for name in options.sections.split(","):
        say(f"== {name} ({results.elapsed():.0f} s)")
        with going_on(out_of_memory=True):
            SECTIONS[name](results, options)
        free()
        results.write()
    say(f"wrote {results.path} after {results.elapsed():.0f} s")


def profile(results: Results, options: argparse.Namespace) -> None:
    """The compiled step of each preset."""
    for preset in options.presets.split(","):
        with going_on(out_of_memory=True):
            measure_preset(results, options, preset, compiled=True)
        free()


def eager(results: Results, options: argparse.Namespace) -> None:
    """The same without compilation."""
    for preset in options.presets.split(","):
        with going_on(out_of_memory=True):
            measure_preset(results, options, preset, compiled=False)
        free()


def measure_preset(results: Results, options: argparse.Namespace, preset: str, compiled: bool) -> None:
    """One preset on each mix of documents, at the largest budget that fits; both mixes share one compilation."""
    shape = Shape.of(options.tokens, 128 if options.toy else 1024)
    while True:
        if results.elapsed() > options.seconds:
            say(f"{preset}: not run, out of time")
            return
        try:
            _measure(results, options, preset, shape, compiled)
            return
        except torch.cuda.OutOfMemoryError:
            say(f"{preset}: {shape.encoder:,} + {shape.decoder:,} tokens do not fit")
        free()
        shape = shape.halved()


def _measure(results: Results, options: argparse.Namespace, preset: str, shape: Shape, compiled: bool) -> None:
    if options.examples:
        shape = Shape(shape.encoder, shape.decoder, options.examples, shape.longest)
    provider = "fat5 compiled" if compiled else "fat5 eager"
    provider += ", no CUDA graphs" if compiled and options.no_cuda_graphs else ""
    kernels = os.environ.get("FAT5_KERNELS", "auto")
    provider += "" if kernels == "auto" else f", kernels {kernels}"
    case = Case.of(
        preset,
        precision=options.precision,
        optimizer=options.optimizer,
        compiled=compiled,
        cuda_graphs=not options.no_cuda_graphs,
    )
    started = False
    for mix, length in MIXED.items():
        length = min(length, shape.longest) if length else None
        batches = [batch(shape, documents(shape, length, seed), seed) for seed in range(4)]
        name = f"{preset} {mix}"
        if not started:
            taken, loss = first_step(case, batches[0])
            results.add(name, provider, "first step", taken, "s")
            say(f"{name}: {case.runner.precision.name}, first step {taken:.1f} s, loss {loss:.3f}")
            started = True
        with turn(options.turn):
            timing = steady(lambda n, b=batches: case.step(n, b[n % 4]), options.measured)  # type: ignore[misc]
            found = profile_step(lambda b=batches[1]: case.step(90, b), synchronize)
        useful, flops = (float(np.mean([of(b) for b in batches])) for of in (tokens, case.flops))
        rate, mfu = useful / timing.seconds, flops / timing.seconds / case.peak()
        memory = timing.memory / 2**30
        results.add(name, provider, "useful tokens/s", rate, "tokens/s")
        results.add(name, provider, "MFU", mfu, "ratio")
        results.add(name, provider, "step", timing.seconds, "s")
        results.add(name, provider, "host busy", timing.host, "s")
        results.add(name, provider, "peak memory", memory, "GiB")
        results.write()
        say(
            f"{name} {provider}: {np.median(rate):,.0f} tokens/s, MFU {np.median(mfu):.1%}, step "
            f"{np.median(timing.seconds) * 1e3:.1f} ms (host {np.median(timing.host) * 1e3:.1f}), "
            f"{useful:,.0f} of {shape.encoder + shape.decoder:,} tokens, peak {memory:.1f} GiB, {len(rate)} steps"
        )
        explain(results, name, provider, found, float(np.median(timing.seconds)))


def explain(results: Results, name: str, provider: str, found: Profile, seconds: float) -> None:
    """Says where a profiled step's time goes; idle is the steady step's time that no kernel fills."""
    busy = sum(taken for kind, taken in found.classes.items() if kind != IDLE)
    found.classes[IDLE] = max(0.0, seconds * 1e3 - busy)
    found.milliseconds = max(busy, seconds * 1e3)
    for kind, taken in found.classes.items():
        results.add(name, provider, f"time in {kind}", taken / 1e3, "s")
    results.write()
    text = found.text(f"{name} {provider}")
    with results.path.with_name("profile.txt").open("a") as file:
        file.write(text + "\n\n")
    say("\n".join(text.splitlines()[:24]))


SECTIONS: dict[str, Callable[[Results, argparse.Namespace], None]] = {
    "profile": profile,
    "eager": eager,
    "hf": hf,
    "long": long,
    "encoder": encoder,
    "decode": decode,
    "accelerate": accelerated,
    "products": products,
    "pretrain": pretrain,
}

if __name__ == "__main__":
    main()
