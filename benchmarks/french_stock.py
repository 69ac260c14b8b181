"""Stock T5ForConditionalGeneration pretrained in transformers.Trainer, beside `fat5 pretrain` with the same keys.

    python benchmarks/french_stock.py --train_seconds 150 --text documents --output_dir runs/stock \
      --config fr/packages --data.mixture t5 --steps 1000

All other keys are those of `fat5 pretrain`: model, shards, optimizer, schedule, precision and validation batches
are those of that run; of `steps` only the shape of the schedule is taken, which runs by the clock. Texts:

    documents   span corruption by a collator of our own, padded; batches of similar lengths in random order, since
                those of Trainer's `group_by_length` go from long to short, fifty at a time, and the loss goes astray
    joined      the same on chunks of one length, cut from documents joined by </s>: no padding, and attention across
    stream      the examples of `fat5 pretrain`, padded, by steps: what packing is compared with

The number of rows is the fastest of a few tried eagerly, accumulated to the tokens of a FAT5 step. On a GPU the model
is compiled, but for `stream`, which is compared by steps: documents are padded to one of WIDTHS, since a graph for
every length took minutes to trace, and every width is compiled before the first step. The clock starts when nothing
new was compiled for a few steps, and stands still in evaluations. metrics.jsonl, summary.json and model/ are as those
of `fat5 pretrain`; so is the exit code 143 of a run that SIGTERM ended.
"""

import argparse
import json
import math
import os
import signal
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Seq2SeqTrainingArguments, TrainerCallback

from fat5.cli.parsing import parse
from fat5.data import PaddedBatch, PaddedLoader, unpack
from fat5.data.examples.padded import pad
from fat5.model import FAT5ForConditionalGeneration, quiet
from fat5.optim import build_optimizer, learning_rate
from fat5.tasks.config import PretrainConfig
from fat5.tasks.pretraining import Pretraining
from fat5.tasks.sizes import Text, settle
from fat5.train.evaluation import unigram_entropy
from fat5.train.log.metrics import MetricsLog
from fat5.train.precision import Precision
from fat5.train.world import World
from finetuning_turns import CountingTrainer, graphs_compiled
from french_texts import WIDTHS, Documents, ShuffledGroups, SpanCorruption, chunk_length
from gpu_step import DEVICE, free, say, synchronize
from gpu_stock import stock_model

GPU = DEVICE.type == "cuda"
JOINED_INPUTS = 512
"""Encoder tokens of a joined chunk, as in T5's own pretraining."""
ROWS = (32, 64, 128, 256) if GPU else (4, 8, 16)
TRIED_DOCUMENTS = 1024 if GPU else 32
QUIET_STEPS, LONGEST_WARM_UP = 6, 240.0
"""The clock starts after as many steps that compile nothing, or after so many seconds."""
LOG_EVERY = 10
EVALUATIONS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--train_seconds", type=float, default=math.inf, help="by the clock described above")
    parser.add_argument("--text", choices=("documents", "joined", "stream"), default="documents")
    parser.add_argument("--rows", type=int, help="of a batch, instead of trying")
    parser.add_argument("--output_dir", type=Path, required=True)
    options, keys = parser.parse_known_args()
    keys += ["--output_dir", str(options.output_dir)]
    config = settle(PretrainConfig(**parse(PretrainConfig, keys, "pretrain")), World(DEVICE))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "config.yaml").write_text(config.to_yaml())
    Stock(config, options).run()


class Stock:
    """A run: model, batches, and what is written of it."""

    def __init__(self, config: PretrainConfig, options: argparse.Namespace) -> None:
        self.config, self.options = config, options
        self.task = Pretraining.open(config, World(DEVICE))
        self.precision = Precision(config.precision, DEVICE)
        self.tokenizer = AutoTokenizer.from_pretrained(self.task.tokenizer)
        torch.manual_seed(config.seed)
        with torch.device(DEVICE), quiet():
            self.model = stock_model(FAT5ForConditionalGeneration(self.task.model_config))
        self.plain = self.model.forward
        self.compiled = GPU and options.text != "stream"
        self.log = MetricsLog(options.output_dir / "metrics.jsonl")
        self.held_out = self._padded_validation()

    def run(self) -> None:
        """Trains, evaluates and writes as `fat5 pretrain` does."""
        options, folder = self.options, self.options.output_dir
        rows = options.rows or (self._rows_of_the_stream() if options.text == "stream" else self._best_rows())
        per_row = self._tokens_a_row()
        wanted = self._tokens_a_step()
        accumulate = 1 if options.text == "stream" else max(1, round(wanted / (rows * per_row)))
        say(f"stock: {rows} rows, {accumulate} batches a step, {per_row:.0f} useful tokens a row")
        if self.compiled:
            torch._dynamo.config.recompile_limit = 2 * len(WIDTHS)
            self.model.forward = torch.compile(self.plain, dynamic=False)
        optimizer = build_optimizer(self.config.optimizer, self.model)
        clock = Clock(self, by_steps=options.text == "stream")
        workers = int(self.config.data.num_workers)
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(folder / "trainer"), per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulate,
            max_steps=self.config.steps if clock.by_steps else 10**7, bf16=self.precision.name == "bf16",
            max_grad_norm=self.config.gradient_clip or 0.0, use_cpu=not GPU, dataloader_num_workers=workers,
            logging_steps=LOG_EVERY if GPU else 1, seed=self.config.seed, save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, dataloader_drop_last=self.compiled,  # one shape less
        )  # fmt: skip
        trainer = PretrainingTrainer(
            model=self.model, args=arguments, train_dataset=self.texts, data_collator=self.collator,
            optimizers=(optimizer, LambdaLR(optimizer, clock.rate)), callbacks=[clock],
        )  # fmt: skip
        # T5 takes any keyword, and Trainer takes that for a loss over all batches of a step: it would add them up.
        trainer.model_accepts_loss_kwargs = False
        clock.trainer = trainer
        if options.text == "stream":
            trainer.batches = PaddedLoader(self.task.loader.stream, rows, num_workers=workers)
        elif options.text == "documents":
            groups = ShuffledGroups([len(one) for one in self.texts.texts], rows, self.config.seed)
            trainer.batches = DataLoader(
                self.texts, batch_sampler=groups, collate_fn=self.collator, num_workers=workers, pin_memory=GPU
            )
        with quiet():
            trainer.train()
        clock.evaluate(trainer.state.global_step)
        self.model.forward = self.plain
        self.model.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        first, last = clock.scores[0], clock.scores[-1]
        summary = {
            "parameters": self.model.num_parameters(), "steps": trainer.state.global_step, "seconds": clock.seconds(),
            "train_tokens": clock.tokens, "tokens_per_second": clock.tokens / max(clock.seconds(), 1e-9),
            "val_loss_first": first["loss"], "val_loss_last": last["loss"], "val_accuracy_last": last["accuracy"],
            "unigram_entropy": unigram_entropy(self.task.validation), "precision": self.precision.name,
            "rows": rows, "accumulated": accumulate, "useful_share": clock.useful / max(clock.computed, 1),
            "seconds_before_the_clock": clock.before, "text": options.text, "compiled": self.compiled,
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        if clock.told:
            raise SystemExit(128 + signal.SIGTERM)

    @cached_property
    def texts(self) -> "Documents | list[dict[str, Any]]":
        """The training split: pieces of documents, or chunks of one length."""
        if self.options.text == "stream":
            return [{}]
        longest = int(self.config.data.max_tokens)
        documents = [piece for source in self.task.loader.stream.sources for piece in source.shards]
        if self.options.text == "joined":
            width, eos = chunk_length(min(JOINED_INPUTS, longest)), np.array([self.tokenizer.eos_token_id])
            order = np.random.default_rng(self.config.seed).permutation(len(documents))
            whole = np.concatenate([part for n in order for part in (documents[n], eos)])
            return Documents(np.split(whole[: len(whole) // width * width], len(whole) // width))
        pieces = [one[at : at + longest] for one in documents for at in range(0, len(one), longest)]
        return Documents([one for one in pieces if len(one) > 1])

    @cached_property
    def collator(self) -> "SpanCorruption":
        sentinels = self.tokenizer.convert_tokens_to_ids([f"<extra_id_{n}>" for n in range(256)])
        known = [one for one in sentinels if one is not None and one != self.tokenizer.unk_token_id]
        widths = WIDTHS if self.compiled and self.options.text == "documents" else ()
        return SpanCorruption(np.array(known), self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, widths)

    def compile_widths(self, trainer: "PretrainingTrainer", rows: int) -> None:
        """Makes a step of every width, which changes no weight."""
        for width in self.collator.widths:
            token = np.array([self.collator.eos])
            trainer.current_gradient_accumulation_steps = 1
            trainer.training_step(trainer.model_wrapped, self.collator.fill([(token, token)] * rows, width))
            self.model.zero_grad(set_to_none=True)
        trainer.taken()

    @torch.no_grad()
    def score(self) -> dict[str, Any]:
        """Cross-entropy and accuracy on the validation examples of the FAT5 run."""
        self.model.eval()
        total = torch.zeros(3, dtype=torch.float64, device=DEVICE)
        for batch in self.held_out:
            moved = {name: value.to(DEVICE) for name, value in batch.items()}
            labels = moved["labels"]
            with self.precision.autocast():
                logits = self.plain(**moved, use_cache=False).logits.float()
            counted = labels != -100
            loss = torch.nn.functional.cross_entropy(logits[counted], labels[counted], reduction="sum")
            right = (logits.argmax(-1)[counted] == labels[counted]).sum()
            total += torch.stack([loss.double(), right.double(), counted.sum().double()])
        self.model.train()
        loss_, right_, tokens = total.tolist()
        return {"loss": loss_ / tokens, "accuracy": right_ / tokens, "tokens": int(tokens)}

    def _padded_validation(self) -> list[PaddedBatch]:
        examples = sorted(
            (one for batch in self.task.validation for one in unpack(batch)), key=lambda one: -len(one[0])
        )
        groups = [examples[first : first + 64] for first in range(0, len(examples), 64)]
        return [pad(*zip(*group), self.task.info.pad_id) for group in groups]

    def _sample(self) -> list[dict[str, Any]]:
        """Training texts of every length, longest first."""
        texts = self.texts
        chosen = np.random.default_rng(0).permutation(len(texts))[:TRIED_DOCUMENTS]
        return sorted((texts[int(n)] for n in chosen), key=lambda row: -len(row["input_ids"]))

    def _best_rows(self) -> int:
        """The rows with which an eager pass over a sample takes least time."""
        sample, taken = self._sample(), {}
        for rows in ROWS:
            batches = [self.collator(sample[first : first + rows]) for first in range(0, len(sample), rows)]
            try:
                for timed in (False, True):
                    synchronize()
                    begun = time.perf_counter()
                    for batch in batches[: None if timed else 2]:
                        with self.precision.autocast():
                            loss = self.plain(**{k: v.to(DEVICE) for k, v in batch.items()}, use_cache=False).loss
                        loss.backward()
                    synchronize()
                    taken[rows] = time.perf_counter() - begun
            except torch.cuda.OutOfMemoryError:
                say(f"stock: {rows} rows do not fit")
                taken.pop(rows, None)
                break
            finally:
                self.model.zero_grad(set_to_none=True)
                free(compiled=False)
        say(f"stock: seconds of {len(sample)} texts by rows: { ({k: round(v, 2) for k, v in taken.items()}) }")
        return min(taken, key=lambda rows: taken[rows])

    def _rows_of_the_stream(self) -> int:
        text = Text.of(self.task.loader.stream)
        return max(1, round(text.tokens_a_step(self.config.data.batch()) / text.piece))

    def _tokens_a_row(self) -> float:
        if self.options.text == "stream":
            text = Text.of(self.task.loader.stream)
            return text.encoder + text.decoder
        batch = self.collator(self._sample())
        return int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum()) / len(batch["labels"])

    def _tokens_a_step(self) -> float:
        """Useful tokens of a step of `fat5 pretrain`."""
        text = Text.of(self.task.loader.stream)
        raw = text.tokens_a_step(self.config.data.batch())
        return raw / text.piece * (text.encoder + text.decoder)


class PretrainingTrainer(CountingTrainer):
    """Takes ready batches if it is given them."""

    batches: PaddedLoader | DataLoader[Any] | None = None

    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader() if self.batches is None else self.batches


class Clock(TrainerCallback):
    """The time of a run: starts it once nothing compiles, logs, evaluates, and ends it.

    Attributes:
        before: seconds until the clock started, from the first step on.
        tokens: useful tokens trained on.
        computed, useful: all tokens and useful tokens, padding and all, of the whole run.
        told: whether SIGTERM came.
    """

    trainer: Any

    def __init__(self, stock: Stock, by_steps: bool) -> None:
        self.stock, self.by_steps = stock, by_steps
        self.limit = stock.options.train_seconds
        self.before, self.tokens, self.computed, self.useful = 0.0, 0, 0, 0
        self.scores: list[dict[str, Any]] = []
        self._begun, self._started, self._evaluating, self._next = 0.0, 0.0, 0.0, 0.0
        self._graphs, self._quiet, self.told = graphs_compiled(), 0, False
        self._last = (0.0, 0)
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self.told = True

    def seconds(self) -> float:
        """Since the clock started, without evaluations."""
        return time.perf_counter() - self._started - self._evaluating if self._started else 0.0

    def rate(self, step: int) -> float:
        """The schedule of the FAT5 run, by the clock or by steps."""
        config = self.stock.config
        if not self.by_steps:
            step = int(min(1.0, self.seconds() / self.limit) * config.steps)
        return learning_rate(config.schedule, step, config.steps)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.evaluate(0)
        self._begun = time.perf_counter()
        self.stock.compile_widths(self.trainer, args.per_device_train_batch_size)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        graphs = graphs_compiled()
        self._quiet = self._quiet + 1 if graphs == self._graphs else 0
        self._graphs = graphs
        waited = time.perf_counter() - self._begun
        if not self._started and (
            self._quiet >= (QUIET_STEPS if self.stock.compiled else 0) or waited > LONGEST_WARM_UP
        ):
            synchronize()
            self._count()
            self._started, self.before = time.perf_counter(), time.perf_counter() - self._begun
            say(f"stock: the clock starts after {self.before:.0f} s and {state.global_step} steps, {graphs} graphs")
        if self.by_steps:
            due = state.global_step % int(self.stock.config.eval_every) == 0 and state.global_step < state.max_steps
        else:
            due = bool(self._started) and self.seconds() > self._next
        if due:
            self._next = self.seconds() + self.limit / EVALUATIONS
            self.evaluate(state.global_step)
        control.should_training_stop = control.should_training_stop or self.told or self.seconds() > self.limit
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs or not self._started:
            return
        before, counted = self._last
        self.tokens += self._count()
        now, done = self.seconds(), self.tokens - counted
        if not done:  # the clock has just started
            return
        row = {"kind": "train", "step": state.global_step, "loss": logs["loss"], "lr": logs["learning_rate"]}
        row |= {"grad_norm": logs.get("grad_norm"), "tokens": self.tokens, "seconds": now}
        self.stock.log.write(row | {"tokens_per_second": done / max(now - before, 1e-9), "step_tokens": done})
        self._last = now, self.tokens

    def evaluate(self, step: int) -> None:
        """Scores the model, once a step."""
        if self.scores and self.scores[-1]["step"] == step:
            return
        synchronize()
        seconds, begun = self.seconds(), time.perf_counter()
        row = {"kind": "eval", "step": step, **self.stock.score(), "seconds": seconds}
        self._evaluating += time.perf_counter() - begun if self._started else 0.0
        self.scores.append(row)
        self.stock.log.write(row)
        say(f"stock: step {step}, {row['seconds']:.0f} s, validation loss {row['loss']:.4f}")

    def _count(self) -> int:
        taken = self.trainer.taken()
        self.useful += taken["useful"]
        self.computed += taken["tokens"]
        return int(taken["useful"])


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
