"""fat5.accelerate on a GPU: a training step of stock T5 beside the same model accelerated, launched and compiled."""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import T5ForConditionalGeneration

import fat5
from fat5.model import FAT5Config
from gpu_measure import Results
from gpu_step import DEVICE, VOCABULARY, free, going_on, say, synchronize
from gpu_stock import in_turn, stock_config

WAYS: dict[str, dict[str, Any] | None] = {"hf sdpa": None, "fat5": {}, "fat5, fused loss": {"fused_loss": True}}


def accelerated(results: Results, options: argparse.Namespace) -> None:
    """Forward, backward and fused AdamW of base under bf16 autocast, 32 rows of 512 + 512 tokens, without padding and
    with; of every way the time, the host's time until all is launched, and the kernels of a step.
    """
    preset, rows, length = ("fat5-demo", 2, 32) if options.toy else (options.stock_preset, options.stock_rows, 512)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        stock = T5ForConditionalGeneration(stock_config(FAT5Config.preset(preset, vocab_size=VOCABULARY)))
    for padded in (False, True):
        inputs = _batch(rows, length, padded)
        useful = int(inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum())
        for compiled in (False, True):
            if results.elapsed() > options.seconds or (compiled and options.stock_eager):
                continue
            name = f"{preset} {rows}x{length}{' padded' if padded else ''}{' compiled' if compiled else ''}"
            torch._dynamo.reset()
            steps: dict[str, Callable[[], Tensor]] = {}
            for way, how in WAYS.items():
                model = copy.deepcopy(stock)
                if how is not None:
                    fat5.accelerate(model, **how)
                with going_on(out_of_memory=True):
                    step, begun = _step(model, inputs, compiled), time.perf_counter()
                    losses = [float(step()) for _ in range(3)]
                    say(f"{name} {way}: first steps {time.perf_counter() - begun:.1f} s, losses {np.round(losses, 4)}")
                    steps[way] = step
            for way, taken in in_turn(steps, options.measured).items():
                rate = useful / taken
                results.add(name, way, "useful tokens/s", rate, "tokens/s")
                results.add(name, way, "host", _host(steps[way]), "s")
                kernels, busy = _kernels(steps[way])
                results.add(name, way, "kernels of a step", kernels, "launches")
                results.add(name, way, "time of its kernels", busy, "s")
                say(
                    f"{name} {way}: {np.median(rate):,.0f} tokens/s, step {np.median(taken) * 1e3:.1f} ms, "
                    f"host {_host(steps[way]) * 1e3:.1f}, {kernels} kernels of {busy * 1e3:.1f}"
                )
            results.write()
            steps.clear()
            free(compiled=compiled)


def _batch(rows: int, length: int, padded: bool) -> dict[str, Tensor]:
    generator = np.random.default_rng(rows)
    lengths = [generator.integers(length // 10, length + 1, rows) if padded else np.full(rows, length) for _ in "ab"]
    inside = [torch.from_numpy(np.arange(length) < one[:, None]) for one in lengths]
    ids, labels = (torch.from_numpy(generator.integers(3, VOCABULARY // 2, (rows, length))) for _ in "ab")
    inputs = {
        "input_ids": ids * inside[0], "attention_mask": inside[0].long(), "labels": labels.masked_fill(~inside[1], -100)
    }  # fmt: skip
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def _step(model: Any, inputs: dict[str, Tensor], compiled: bool) -> Callable[[], Tensor]:
    model.train()
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=DEVICE.type == "cuda")

    def step() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss: Tensor = forward(**inputs, use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _host(step: Callable[[], object]) -> float:
    """Seconds until a step is launched, the least of three."""
    taken = []
    for _ in range(3):
        synchronize()
        begun = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begun)
    synchronize()
    return min(taken)


def _kernels(step: Callable[[], object]) -> tuple[int, float]:
    """How many kernels a step launches, and their seconds."""
    if DEVICE.type != "cuda":
        return 0, 0.0
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        synchronize()
    kernels = [one for one in found.events() if one.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels), sum(one.device_time for one in kernels) / 1e6
