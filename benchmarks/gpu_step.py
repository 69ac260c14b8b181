"""What the GPU training benchmarks train: synthetic packed batches, the trainer's own step, and its timing."""

import fcntl
import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fat5.data import PackedBatch
from fat5.model import FAT5Config, FAT5ForConditionalGeneration
from fat5.optim import OptimizerConfig
from fat5.tasks import PretrainConfig
from fat5.train.cost.flops import peak_flops, training_flops
from fat5.train.precision import resolve_precision
from fat5.train.step import StepResult, StepRunner
from fat5.train.world import World

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARY = 32768
SHORTEST = 50


@dataclass(frozen=True)
class Shape:
    """Budgets of a micro-batch: encoder tokens, decoder tokens, most documents, longest document."""

    encoder: int
    decoder: int
    documents: int
    longest: int

    @classmethod
    def of(cls, tokens: int, longest: int) -> "Shape":
        """As the trainer makes it: a document for every 16 encoder tokens at most."""
        return cls(tokens, tokens, max(8, tokens // 16), longest)

    def halved(self) -> "Shape":
        return replace(self, encoder=self.encoder // 2, decoder=self.decoder // 2, documents=self.documents // 2)


def documents(shape: Shape, length: int | None, seed: int) -> list[tuple[int, int]]:
    """(encoder, decoder) lengths that fit the shape: all `length`, or each from 50 to the longest, drawn alike."""
    generator = np.random.default_rng(seed)
    found: list[tuple[int, int]] = []
    room = [shape.encoder, shape.decoder]
    while len(found) < shape.documents:
        pair = [length] * 2 if length else generator.integers(min(SHORTEST, shape.longest), shape.longest + 1, 2)
        if any(size > left for size, left in zip(pair, room)):
            break
        room = [left - size for size, left in zip(pair, room)]
        found.append((int(pair[0]), int(pair[1])))
    # What is left over is filled with one shorter document, as a packer that looks ahead would do.
    if not length and min(room) >= SHORTEST and len(found) < shape.documents:
        found.append((min(room[0], shape.longest), min(room[1], shape.longest)))
    return found


def batch(shape: Shape, lengths: list[tuple[int, int]], seed: int, vocabulary: int = VOCABULARY) -> PackedBatch:
    """A packed batch of random tokens, as `fat5.data.BatchWriter` lays it out."""
    generator = np.random.default_rng(seed)
    starts = np.zeros((2, shape.documents + 1), np.int32)
    for side in (0, 1):
        sizes = [pair[side] for pair in lengths] + [0] * (shape.documents - len(lengths))
        starts[side, 1:] = np.cumsum(sizes)
    inputs = generator.integers(3, vocabulary, shape.encoder)
    labels = generator.integers(3, vocabulary, shape.decoder)
    inputs[starts[0, -1] :], labels[starts[1, -1] :] = 0, -100
    cu_inputs, cu_labels = (torch.from_numpy(side.copy()) for side in starts)
    none = np.full(shape.documents, -1)
    return PackedBatch(
        torch.from_numpy(inputs),
        cu_inputs,
        shape.longest,
        torch.from_numpy(labels),
        cu_labels,
        shape.longest,
        torch.from_numpy(none.astype(np.int8)),
        torch.from_numpy(none),
        len(lengths),
        int(starts[0, -1]),
    )


@dataclass
class Case:
    """A model and its step."""

    config: PretrainConfig
    model: FAT5ForConditionalGeneration
    runner: StepRunner

    @classmethod
    def of(
        cls,
        preset: str,
        *,
        precision: str = "auto",
        optimizer: str = "adamw_scale",
        compiled: bool = True,
        checkpointing: str = "none",
        cuda_graphs: bool = True,
        offload: bool = False,
        vocabulary: int = VOCABULARY,
    ) -> "Case":
        config = PretrainConfig(
            optimizer=OptimizerConfig(name=optimizer, offload=offload),  # type: ignore[arg-type]
            precision=resolve_precision(precision, DEVICE),  # type: ignore[arg-type]
            compile=compiled,
            cuda_graphs="auto" if cuda_graphs else False,
            gradient_checkpointing=checkpointing,  # type: ignore[arg-type]
        )
        torch.manual_seed(0)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with torch.device(DEVICE):
            model = FAT5ForConditionalGeneration(FAT5Config.preset(preset, vocab_size=vocabulary))
        runner = StepRunner(config, model, World(DEVICE))
        return cls(config, model, runner)

    def step(self, number: int, packed: PackedBatch) -> StepResult:
        return self.runner.run([packed], min(1.0, (number + 1) / 100))

    def flops(self, packed: PackedBatch) -> float:
        """Useful operations of a step."""
        return training_flops(self.model.config, packed.cu_seqlens.diff(), packed.decoder_cu_seqlens.diff())

    def peak(self) -> float:
        """Operations a second at best; a GPU that the table does not know counts as an H200."""
        return peak_flops(DEVICE, self.runner.precision.name) or 989e12


def tokens(packed: PackedBatch) -> int:
    """Useful tokens: the encoder's and the decoder's, without padding."""
    return int(packed.cu_seqlens[-1]) + packed.num_items


def first_step(case: Case, packed: PackedBatch) -> tuple[float, float]:
    """Seconds of the first step, compilation included, and its loss."""
    start = time.perf_counter()
    loss, norm, _ = case.step(0, packed).read()
    synchronize()
    if not (loss == loss and norm == norm):
        raise RuntimeError(f"the first step has loss {loss} and gradient norm {norm}")
    return time.perf_counter() - start, loss


@dataclass
class Timing:
    """Steps of a steady run: seconds of each, seconds that the host was busy with each, and the most bytes that PyTorch
    held since its case began (recordings of CUDA graphs included)."""

    seconds: np.ndarray
    host: np.ndarray
    memory: int


def steady(step: Callable[[int], StepResult], budget: float, most: int = 60) -> Timing:
    """Steps as the trainer makes them, one step's numbers read while the next is under way, for `budget` seconds.

    The first two are not counted.
    """
    ends, host = [], []
    pending: StepResult | None = None
    started = time.perf_counter()
    while len(ends) < 6 or (time.perf_counter() - started < budget and len(ends) < most):
        before = time.perf_counter()
        result = step(len(ends) + 1)
        host.append(time.perf_counter() - before)
        if pending is not None:
            pending.read()
        pending = result
        ends.append(time.perf_counter())
    synchronize()
    memory = torch.cuda.max_memory_reserved() if DEVICE.type == "cuda" else 0
    return Timing(np.diff(ends)[1:], np.array(host[2:]), memory)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def say(line: str) -> None:
    print(line, flush=True)


def free(compiled: bool = True) -> None:
    """Gives back what the last model held, its compiled code too."""
    if compiled:
        torch._dynamo.reset()
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def turn(file: Path | None) -> Iterator[None]:
    """Inside, this process alone holds the lock of `file`, if there is one: others may compile, but not time."""
    if file is None:
        yield
        return
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


@contextmanager
def going_on(out_of_memory: bool = False) -> Iterator[None]:
    """A failure inside is printed, not raised; out of memory passes unless told: a smaller case may follow."""
    began = time.perf_counter()
    try:
        yield
    except Exception as failure:
        if isinstance(failure, torch.cuda.OutOfMemoryError) and not out_of_memory:
            raise
        traceback.print_exc(limit=8)
        say(f"failed after {time.perf_counter() - began:.0f} s")
