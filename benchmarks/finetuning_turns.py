"""The two loops of finetuning.py: ours, and Seq2SeqTrainer's, which gives ours a turn after each of its rounds."""

import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from fat5.tasks.finetune.finetuning import Finetuning
from fat5.train.step import StepResult, StepRunner
from fat5.train.world import World
from gpu_step import DEVICE, free, say, synchronize, turn

GPU = DEVICE.type == "cuda"
WARM_UP = 4 if GPU else 2
"""Steps of each side before the first round; a compiled stock model makes as many in a row that compile nothing."""
FEWEST_ROUNDS = 3


class Ours:
    """The loop of `fat5 finetune` without its log: batches, steps, a step's numbers read while the next is under way.

    Attributes:
        count: steps, their examples, useful tokens, and all tokens.
    """

    def __init__(self, task: Finetuning) -> None:
        self.task = task
        torch.manual_seed(0)
        self.model = task.build_model()
        self.runner = StepRunner(task.config, self.model, World(DEVICE), task.objective)
        self.batches = iter(task.loader)
        self.count: Counter[str] = Counter()

    def steps(self, number: int) -> float:
        """Useful tokens/s of `number` steps."""
        before, pending = self.count["useful"], list[StepResult]()
        synchronize()
        begun = time.perf_counter()
        for _ in range(number):
            batches = [next(self.batches) for _ in range(self.task.loader.micro_batches_per_step)]
            pending.append(self.runner.run(batches, 1.0))
            if not self.runner.deferred or len(pending) > 1:
                pending.pop(0).read()
            for batch in batches:
                self.count["examples"] += batch.num_examples
                self.count["useful"] += int(batch.cu_seqlens[-1]) + batch.num_items
                self.count["tokens"] += batch.input_ids.numel() + batch.labels.numel()
            self.count["steps"] += 1
        for result in pending:
            result.read()
        synchronize()
        return (self.count["useful"] - before) / (time.perf_counter() - begun)


@dataclass
class Comparison:
    """What both loops did in turns."""

    ours: list[float] = field(default_factory=list)
    """Useful tokens/s of each round"""
    stock: list[float] = field(default_factory=list)
    first_steps: float = 0.0
    """Seconds of the stock loop's warm-up, compilation included"""
    memory: int = 0
    """Most bytes of the GPU that PyTorch held for the stock loop"""
    count: Counter[str] = field(default_factory=Counter)
    """Useful tokens and all tokens of the stock loop's rounds"""


def in_turns(
    ours: Ours,
    stock: Any,
    tokenizer: Any,
    folder: Path,
    *,
    compiled: str,
    dynamic: bool,
    measured: float,
    left: Callable[[], float],
    lock: Path | None,
) -> Comparison:
    """Trains `stock` on the examples of `ours`, whose turn it is after each round.

    Args:
        stock: on the CPU; its weights on a GPU count in `Comparison.memory`.
        folder: Seq2SeqTrainer wants one; nothing is saved.
        compiled: "" or what of the stock model is: "blocks", one by one, "whole", both by the trainer, or "plain", by
            torch.compile without the trainer's knowledge.
        dynamic: lengths are symbols from the first graph on; else torch.compile finds out that they change.
        measured: seconds after which no further pair of rounds begins. left: the same for the whole program.
        lock: a file that is locked in the meantime, or None.
    """
    base = fresh_peak()
    task = ours.task
    config, examples, size = task.config, task.train.examples, task.config.data.batch_size
    rows = [
        {"input_ids": examples.input(index).tolist(), "labels": examples.target(index).tolist()}
        for index in range(len(examples))
    ]
    if compiled == "plain":
        stock.forward = torch.compile(stock.forward, dynamic=dynamic or None)
    elif compiled:
        # What a user has set stays.
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", str(compiled == "blocks"))
        if dynamic:
            os.environ.setdefault("ACCELERATE_DYNAMO_USE_DYNAMIC", "true")
    by_trainer = compiled in ("blocks", "whole")
    workers = int(config.data.num_workers)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=size, max_steps=10**6, bf16=config.precision == "bf16",
        learning_rate=float(config.optimizer.lr or 0), lr_scheduler_type="constant", optim="adamw_torch_fused",
        max_grad_norm=config.gradient_clip, use_cpu=not GPU, torch_compile=by_trainer, dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0, save_strategy="no", report_to="none", disable_tqdm=True,
        **grouped_by_length(),
    )  # fmt: skip
    # The stock sampler sorts this many batches at once, from long to short: a round has them all, and on a CPU, where
    # that takes a minute, the fewest rounds together do.
    steps = max(1, min(len(rows) // (size * 4), 50))
    rounds = Rounds(ours, steps if GPU else -(-steps // FEWEST_ROUNDS), measured, left, lock, bool(compiled))
    rounds.trainer = CountingTrainer(
        model=stock, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[rounds],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=stock, pad_to_multiple_of=8 if GPU else None),
    )  # fmt: skip
    rounds.begun = time.perf_counter()
    with rounds.lock:
        rounds.trainer.train()
    if compiled and not rounds.graphs:
        raise RuntimeError("torch_compile compiled nothing")
    rounds.found.memory -= base
    return rounds.found


def grouped_by_length() -> dict[str, Any]:
    """The argument of Trainer that puts texts of similar lengths into a batch, under this version's name."""
    named = "train_sampling_strategy" in {field.name for field in fields(Seq2SeqTrainingArguments)}
    return {"train_sampling_strategy": "group_by_length"} if named else {"group_by_length": True}


class CountingTrainer(Seq2SeqTrainer):
    """Counts useful tokens on the device, so that counting makes nobody wait."""

    useful: Any = 0
    tokens = 0

    def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        self.useful = self.useful + inputs["attention_mask"].sum() + (inputs["labels"] != -100).sum()
        self.tokens += inputs["input_ids"].numel() + inputs["labels"].numel()
        return super().training_step(model, inputs, *rest, **named)

    def taken(self) -> Counter[str]:
        """Useful tokens and all tokens since the last call; waits for the device."""
        found = Counter(useful=int(self.useful), tokens=self.tokens)
        self.useful, self.tokens = 0, 0
        return found


class Rounds(TrainerCallback):
    """Between two steps of the stock loop: ends its warm-up, times its rounds, and gives ours a turn after each."""

    trainer: CountingTrainer

    def __init__(
        self, ours: Ours, steps: int, measured: float, left: Callable[[], float], lock: Path | None, compiled: bool
    ) -> None:
        self.ours, self.steps, self.measured, self.left, self.file = ours, steps, measured, left, lock
        self.compiled = compiled
        self.found, self.lock = Comparison(), ExitStack()
        self.made, self.graphs, self.compiled_at = 0, 0, 0
        self.begun, self.started = 0.0, 0.0
        self.graphs_before = graphs_compiled()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.made += 1
        if not self.started:
            self._warm_up()
        elif self.made == self.steps:
            count = self.trainer.taken()
            self.found.stock.append(count["useful"] / (time.perf_counter() - self.begun))
            self.found.count.update(count)
            self.found.ours.append(self.ours.steps(self.steps))
            self._begin()
            over = self.begun - self.started > self.measured or self.left() < 0
            control.should_training_stop = over and len(self.found.ours) >= FEWEST_ROUNDS
        return control

    def _warm_up(self) -> None:
        graphs = graphs_compiled() - self.graphs_before
        if graphs != self.graphs:
            self.graphs, self.compiled_at = graphs, self.made
            say(f"stock: {graphs} graphs by step {self.made}, {time.perf_counter() - self.begun:.0f} s")
        if self.made < self.compiled_at + WARM_UP:
            if self.left() > 0:
                return
            if self.compiled:
                raise RuntimeError("out of time while the stock model compiles; see --compile_stock, --static_first")
        synchronize()
        self.found.first_steps = time.perf_counter() - self.begun
        self.found.memory = torch.cuda.max_memory_reserved() if GPU else 0
        self.lock.enter_context(turn(self.file))
        self.started = time.perf_counter()
        self._begin()

    def _begin(self) -> None:
        self.trainer.taken()
        self.made, self.begun = 0, time.perf_counter()


def graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def fresh_peak() -> int:
    """Bytes of the GPU that PyTorch holds now; from here a new peak is counted."""
    if not GPU:
        return 0
    free(compiled=False)
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_reserved()
