"""Stock transformers on a GPU, beside FAT5 in one run: T5 trained on padded batches, umT5's encoder."""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import T5Config, T5ForConditionalGeneration, UMT5Config, UMT5EncoderModel

from fat5 import accelerate
from fat5.data import PackedBatch
from fat5.data.examples.padded import pad, unpack
from fat5.generate.decoding import Decoder
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.ops import use_kernels
from fat5.optim import OptimizerConfig, build_optimizer
from fat5.train.step import StepResult
from gpu_measure import Results
from gpu_step import (
    DEVICE,
    VOCABULARY,
    Case,
    Shape,
    Timing,
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

ROUNDS = 2
"""Each provider is measured in turn, so often."""


def hf(results: Results, options: argparse.Namespace) -> None:
    """The same examples through stock T5 (sdpa, compiled, autocast as ours) on dynamically padded batches."""
    preset = "fat5-demo" if options.toy else options.stock_preset
    shape = Shape.of(options.tokens, 128 if options.toy else 1024)
    ours = Case.of(preset, precision=options.precision, optimizer=options.optimizer, compiled=not options.stock_eager)
    rows = options.stock_rows
    stock = StockStep(ours, options.optimizer)
    for mix in ("512", "1024"):
        length = min(512, shape.longest) if mix == "512" else None
        packed = [batch(shape, documents(shape, length, seed), seed) for seed in range(4)]
        if results.elapsed() > options.seconds:
            say(f"{mix}: not run, out of time")
            return
        if not options.stock_eager:
            # One shape is compiled as it is, lengths that differ as a graph that takes any.
            stock.forward = torch.compile(stock.model, dynamic=length is None)
        taken, loss = first_step(ours, packed[0])
        say(f"{preset} {mix}: fat5 first step {taken:.1f} s, loss {loss:.4f}")
        while True:
            try:
                groups = [stock.batches(one, rows) for one in packed]
                started = time.perf_counter()
                losses = [stock.step(group).read()[0] for group in groups]
                break
            except torch.cuda.OutOfMemoryError:
                say(f"{preset} {mix}: {rows} rows do not fit beside ours")
            stock.optimizer.zero_grad(set_to_none=True)
            free(compiled=False)
            rows //= 2
        say(f"{preset} {mix}: hf first steps {time.perf_counter() - started:.1f} s, losses {np.round(losses, 4)}")
        _compare(results, options, f"{preset} {mix}", ours, packed, stock, groups, rows)


def _compare(
    results: Results,
    options: argparse.Namespace,
    name: str,
    ours: Case,
    packed: list[PackedBatch],
    stock: "StockStep",
    groups: list[list[dict[str, Tensor]]],
    rows: int,
) -> None:
    useful = float(np.mean([tokens(one) for one in packed]))
    provider = f"hf sdpa, padded, {rows} rows" + (", eager" if options.stock_eager else "")
    steps: dict[str, Callable[[int], StepResult]] = {
        "fat5 beside hf": lambda n: ours.step(n, packed[n % 4]),
        provider: lambda n: stock.step(groups[n % 4]),
    }
    timings: dict[str, list[Timing]] = {key: [] for key in steps}
    with turn(options.turn):
        for _ in range(ROUNDS):
            for key, step in steps.items():
                timings[key].append(steady(step, options.measured))
    rates = {key: useful / np.concatenate([t.seconds for t in found]) for key, found in timings.items()}
    padded = sum(one["input_ids"].numel() + one["labels"].numel() for group in groups for one in group) / len(groups)
    for key, rate in rates.items():
        results.add(name, key, "useful tokens/s", rate, "tokens/s")
        say(f"{name} {key}: {np.median(rate):,.0f} useful tokens/s (p20 {np.percentile(rate, 20):,.0f})")
    mine, theirs = rates.values()
    ratio = float(np.median(mine) / np.median(theirs))
    results.add(name, f"fat5 / {provider}", "speed-up", ratio, "ratio")
    results.add(name, provider, "peak memory of both models", timings[provider][0].memory / 2**30, "GiB")
    results.add(name, provider, "useful share of its tokens", useful / padded, "ratio")
    results.write()
    say(
        f"{name}: {ratio:.2f} times the useful tokens/s of {provider}, {useful / padded:.0%} of whose tokens are useful"
    )


class StockStep:
    """A training step of T5ForConditionalGeneration as the trainer makes it: same weights, autocast, optimizer."""

    def __init__(self, ours: Case, optimizer: str) -> None:
        self.precision = ours.runner.precision
        self.model = stock_model(ours.model).to(self.precision.weight_dtype)
        self.forward: Callable[..., Any] = self.model
        self.weights = list(self.model.parameters())
        self.optimizer = build_optimizer(OptimizerConfig(name=optimizer), self.model)  # type: ignore[arg-type]

    def batches(self, packed: PackedBatch, rows: int) -> list[dict[str, Tensor]]:
        """The examples in dynamically padded batches of `rows`, in page-locked memory."""
        examples = unpack(packed)
        found = []
        for first in range(0, len(examples), rows):
            inputs, labels = zip(*examples[first : first + rows])
            padded = pad(inputs, labels, 0)
            found.append({k: v.pin_memory() if DEVICE.type == "cuda" else v for k, v in padded.items()})
        return found

    def step(self, group: list[dict[str, Tensor]]) -> StepResult:
        """One optimizer step over all batches of `group`; the loss is the mean over all their targets."""
        targets = sum(int((one["labels"] != -100).sum()) for one in group)
        losses = []
        for one in group:
            share = int((one["labels"] != -100).sum()) / targets
            inputs = {key: value.to(DEVICE, non_blocking=True) for key, value in one.items()}
            with self.precision.autocast():
                loss = self.forward(**inputs, use_cache=False).loss * share
            loss.backward()
            losses.append(loss.detach())
        norm = get_total_norm([weight.grad for weight in self.weights if weight.grad is not None])
        clip_grads_with_norm_(self.weights, 1.0, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        numbers = torch.stack([torch.stack(losses).sum(), norm])
        if DEVICE.type != "cuda":
            return StepResult(numbers, None)
        host = torch.empty_like(numbers, device="cpu", pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return StepResult(host, None, ready)


def stock_model(ours: FAT5ForConditionalGeneration) -> T5ForConditionalGeneration:
    """Stock T5 with the form and the weights of a model of FAT5, in training mode, on the same device."""
    with torch.device(ours.device):
        model = T5ForConditionalGeneration(stock_config(ours.config))
    # Stock T5 ties its head to its embeddings whatever the configuration says.
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    model.load_state_dict(ours.state_dict())
    return model.train()


def stock_config(ours: FAT5Config) -> T5Config:
    """The configuration of that model."""
    keys = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads", "dropout_rate")
    return T5Config(
        **{key: getattr(ours, key) for key in keys},
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        **{key: getattr(ours, key) for key in ("pad_token_id", "eos_token_id", "decoder_start_token_id")},
        attn_implementation="sdpa",
    )


def encoder(results: Results, options: argparse.Namespace) -> None:
    """An umT5-XXL-shaped encoder, random bf16 weights, 512 tokens a prompt: stock sdpa and FAT5, which leaves padding
    out, eager and compiled.
    """
    sizes = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=VOCABULARY)
    length, counts = 512, (1, 8, 32)
    if options.toy:
        sizes, length, counts = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=512), 64, (2,)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE), torch.inference_mode(False):
            stock = UMT5EncoderModel(UMT5Config(**sizes, dropout_rate=0.0, attn_implementation="sdpa")).eval()  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(before)
    ours = copy.deepcopy(stock)
    ours = accelerate(ours, compute_padding=False)  # as the figures published so far; without it padding is computed
    say(f"{sum(p.numel() for p in stock.parameters()) / 1e9:.2f}B parameters, {stock.dtype}")
    providers: dict[str, Callable[..., object]] = {"hf sdpa": stock, "fat5": ours}
    if DEVICE.type == "cuda":
        graphs = accelerate(copy.deepcopy(stock), compute_padding=False, cuda_graphs=True)
        providers["fat5, CUDA graphs"] = graphs
    if not options.stock_eager:
        providers |= {"hf sdpa compiled": torch.compile(stock), "fat5 compiled": torch.compile(ours)}
    for count in counts:
        for padded in (False, True):
            if results.elapsed() > options.seconds:
                say("out of time")
                return
            inputs = _prompts(count, length, padded, sizes["vocab_size"])
            name = f"umt5-xxl encoder {count}x{length}" + (" padded" if padded else "")
            with going_on(out_of_memory=True):
                _encode(results, options, name, providers, inputs)


def _prompts(count: int, length: int, padded: bool, vocabulary: int) -> dict[str, Tensor]:
    """Rows of `length` tokens, or of an eighth of it to all, padded."""
    generator = np.random.default_rng(count)
    lengths = generator.integers(length // 8, length + 1, count) if padded else np.full(count, length)
    lengths[0] = length
    mask = torch.from_numpy((np.arange(length) < lengths[:, None]).astype(np.int64))
    ids = torch.from_numpy(generator.integers(3, vocabulary, (count, length))) * mask
    return {"input_ids": ids.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def _encode(
    results: Results,
    options: argparse.Namespace,
    name: str,
    providers: dict[str, Callable[..., object]],
    inputs: dict[str, Tensor],
) -> None:
    kept = inputs["attention_mask"].bool()
    outputs: dict[str, Tensor] = {}
    with torch.inference_mode():
        for key, call in providers.items():
            try:
                for _ in range(3):
                    outputs[key] = call(**inputs).last_hidden_state[kept].float()  # type: ignore[attr-defined]
            except Exception as failure:
                say(f"{name} {key}: {type(failure).__name__} {str(failure)[:300]}")
        times = in_turn({key: partial(providers[key], **inputs) for key in outputs}, options.measured)
    reference = outputs["hf sdpa"]
    for key, taken in times.items():
        error = float((outputs[key] - reference).norm() / reference.norm())
        rate = int(kept.sum()) / taken
        results.add(name, key, "time", taken, "s")
        results.add(name, key, "useful tokens/s", rate, "tokens/s")
        results.add(name, key, "difference from hf sdpa", error, "ratio")
        say(f"{name} {key}: {np.median(taken) * 1e3:.2f} ms, {np.median(rate):,.0f} tokens/s, differs by {error:.2e}")
    results.write()


def decode(results: Results, options: argparse.Namespace) -> None:
    """Stock T5, bf16, writes 128 tokens behind 8 prompts of 128, greedy and with beams: by `generate` and by FAT5."""
    preset, length, new = ("fat5-demo", 16, 8) if options.toy else (options.stock_preset, 128, 128)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(stock_config(FAT5Config.preset(preset, vocab_size=VOCABULARY)))
    model = model.to(DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32).eval()
    # Every row writes all its tokens, so that every provider does the same work.
    model.generation_config.eos_token_id = None
    inputs = _prompts(8, length, True, VOCABULARY)
    for case, ways in (("beams 4", {"num_beams": 4}), ("greedy", {})):
        how = {"max_new_tokens": new, "do_sample": False, **ways}
        _decode(results, options, f"{preset} {case} 8x{new}", model, inputs, how)


def _decode(
    results: Results,
    options: argparse.Namespace,
    name: str,
    model: Any,
    inputs: dict[str, Tensor],
    how: dict[str, Any],
) -> None:
    decoder = Decoder(model)
    providers: dict[str, Callable[[], Tensor]] = {
        "hf generate": lambda: model.generate(**inputs, **how),
        "fat5 decoding": lambda: decoder.generate(**inputs, **how, eos_token_id=[]),
    }
    if DEVICE.type == "cuda":
        before = use_kernels("decoding=plain")
        plain = Decoder(model)  # PyTorch's own kernels, in CUDA graphs
        use_kernels(before)
        providers |= {
            "hf generate, static cache, compiled": lambda: model.generate(
                **inputs, **how, cache_implementation="static"
            ),
            "fat5 decoding, CUDA graph": lambda: decoder.generate(**inputs, **how, eos_token_id=[], cuda_graph=True),
            "fat5 decoding, CUDA graph, PyTorch's kernels": lambda: plain.generate(
                **inputs, **how, eos_token_id=[], cuda_graph=True
            ),
        }
    written: dict[str, Tensor] = {}
    for key, call in providers.items():
        with going_on(out_of_memory=True):
            begun = time.perf_counter()
            written[key] = call().cpu()
            say(f"{name} {key}: first call {time.perf_counter() - begun:.1f} s")
    times = in_turn({key: providers[key] for key in written}, options.measured)
    stock, tokens = written["hf generate"], 8 * how["max_new_tokens"]
    for key, taken in times.items():
        same = float((written[key] == stock).float().mean()) if written[key].shape == stock.shape else 0.0
        rate = tokens / taken
        results.add(name, key, "new tokens/s", rate, "tokens/s")
        results.add(name, key, "tokens equal to hf generate", same, "ratio")
        say(f"{name} {key}: {np.median(rate):,.0f} new tokens/s, {same:.1%} of tokens as hf generate's")
    results.write()


def in_turn(providers: dict[str, Callable[[], object]], budget: float) -> dict[str, np.ndarray]:
    """Seconds of each, one after another, at least three times and for about `budget` seconds in all."""
    times: dict[str, list[float]] = {key: [] for key in providers}
    started, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - started < budget:
        rounds += 1
        for key, call in providers.items():
            synchronize()
            begun = time.perf_counter()
            call()
            synchronize()
            times[key].append(time.perf_counter() - begun)
    return {key: np.array(taken) for key, taken in times.items()}
