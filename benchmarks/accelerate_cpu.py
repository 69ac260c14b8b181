"""What does `fat5.accelerate` make of a stock model on the CPU? Time and memory beside the same model untouched (sdpa).

python benchmarks/accelerate_cpu.py [--threads 2] [--repeats 5] [--shape flan-t5-base] [--memory-length 4096]

A batch of texts of 50 to 512 tokens, padded to the longest, with targets of 16 to 64: a forward pass in evaluation
mode, the encoder alone, and a training step (forward, backward, AdamW). Both models share their weights, so that
neither is at home in the cache, and run in turn. Losses are compared before anything is timed. Memory: what a forward
pass and a training step of one long text need beyond weights and gradients, each in a process of its own.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

import fat5
import measure

_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
SHAPES: dict[str, dict[str, Any]] = {
    "flan-t5-base": _GATED
    | dict(vocab_size=32128, d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_decoder_layers=12, num_heads=12),
    "flan-t5-small": _GATED
    | dict(vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6),
    # For a look at whether this file runs.
    "tiny": _GATED
    | dict(vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4),
}
# The design's bound on logits, relative; losses of both must agree to it before they are timed.
TOLERANCE = 1e-5
PROVIDERS = ["stock sdpa", "accelerated", "attention alone", "accelerated, fused loss"]


def stock_model(shape: str) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(**SHAPES[shape], decoder_start_token_id=0, attn_implementation="sdpa")
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model) * config.d_model**-0.5)
    return model


def twin(model: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
    """Other modules over the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def providers(model: T5ForConditionalGeneration) -> dict[str, T5ForConditionalGeneration]:
    attention_alone = twin(model)
    attention_alone.set_attn_implementation("fat5")
    return {
        "stock sdpa": model,
        "accelerated": fat5.accelerate(twin(model)),
        "attention alone": attention_alone,
        "accelerated, fused loss": fat5.accelerate(twin(model), fused_loss=True),
    }


def batch(rows: int, shortest: int, longest: int, vocabulary: int) -> dict[str, Tensor]:
    """Lengths from `shortest` to `longest`; targets from 16 tokens to 64."""

    def padded(lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return torch.randint(2, vocabulary, mask.shape), mask

    ids, mask = padded(torch.linspace(shortest, longest, rows).round().long())
    labels, kept = padded(torch.linspace(64, 16, rows).round().long())
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels.masked_fill(~kept, -100)}


def forward(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return model(**inputs, use_cache=False).loss


def encode(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return model.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]


def train(model: Any, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    model.train()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def timings(shape: str, rows: int, repeats: int) -> list[dict[str, object]]:
    models = providers(stock_model(shape))
    inputs = batch(rows, 50, 512, SHAPES[shape]["vocab_size"])
    # A rate at which weights hold still, so that every round computes the same.
    optimizer = torch.optim.AdamW(models["stock sdpa"].parameters(), lr=1e-9)
    useful = int(inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum())
    share = useful / (inputs["input_ids"].numel() + inputs["labels"].numel())
    losses = {name: float(forward(model, inputs)) for name, model in models.items()}
    worst = max(abs(loss - losses["stock sdpa"]) / losses["stock sdpa"] for loss in losses.values())
    if not worst <= TOLERANCE:
        raise SystemExit(f"the losses differ by {worst:.1e}: {losses}")
    found = [
        measure.row(shape, "accelerated", "loss difference", np.array([worst]), "relative"),
        measure.row(shape, "batch", "tokens that are no padding", np.array([share]), "share"),
    ]
    steps: dict[str, Callable[[Any], Tensor]] = {
        "encoder": partial(_swap, encode, inputs),
        "forward": partial(_swap, forward, inputs),
        "training step": partial(_swap, partial(train, optimizer=optimizer), inputs),
    }
    for step, run in steps.items():
        names = PROVIDERS if step == "training step" else PROVIDERS[:3]
        seconds = measure.interleaved({name: partial(run, models[name]) for name in names}, repeats=repeats)
        case = f"{shape} {step}, B{rows} L50-512"
        for name, samples in seconds.items():
            found.append(measure.row(case, name, "time", samples, "s"))
            if name != "stock sdpa":
                found.append(measure.row(case, f"stock / {name}", "speed-up", seconds["stock sdpa"] / samples, "ratio"))
    return found


def _swap(step: Callable[..., Tensor], inputs: dict[str, Tensor], model: Any) -> Tensor:
    return step(model, inputs)


def memory(shapes: dict[str, str], length: int, threads: int) -> list[dict[str, object]]:
    """For each step, of the shape given for it."""
    found = []
    for step, shape in shapes.items():
        case = f"{shape} {step}, B1 L{length}"
        peak = {}
        for name in PROVIDERS[:3]:
            probing = ["--probe", name, step, "--shape", shape, "--memory-length", str(length)]
            command = [sys.executable, __file__, *probing, "--threads", str(threads)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peak[name] = np.array([float(out.split()[-1])])
            found.append(measure.row(case, name, "peak memory", peak[name], "bytes"))
        for name in PROVIDERS[1:3]:
            found.append(measure.row(case, f"stock / {name}", "memory", peak["stock sdpa"] / peak[name], "ratio"))
    return found


def probe(name: str, step: str, shape: str, length: int) -> None:
    """Prints the bytes at the peak beyond what lies there before: weights and, in training, gradients."""
    model = providers(stock_model(shape))[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    small, long = (batch(1, size, size, SHAPES[shape]["vocab_size"]) for size in (64, length))
    run = forward if step == "forward" else partial(train, optimizer=optimizer)
    if step != "forward":
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.zero_grad = lambda: None  # type: ignore[method-assign, assignment]
    run(model, small)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    before = resident("VmRSS")
    run(model, long)
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of /proc/self/status: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--shape", choices=list(SHAPES), default="flan-t5-base")
    # A training step of stock FLAN-T5-base at 4,096 tokens wants some 24 GB.
    parser.add_argument("--training-memory-shape", choices=list(SHAPES), default="flan-t5-small")
    parser.add_argument("--memory-length", type=int, default=4096)
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.probe:
        probe(*arguments.probe, arguments.shape, arguments.memory_length)
        return
    rows = timings(arguments.shape, arguments.rows, arguments.repeats)
    shapes = {"forward": arguments.shape, "training step": arguments.training_memory_shape}
    rows += memory(shapes, arguments.memory_length, arguments.threads)
    measure.save("accelerate_cpu", rows)


if __name__ == "__main__":
    main()
