"""The training loop: step, guard, log, evaluate, save, and leave or go back in good order.

    Trainer.run        the loop                      Trainer.restore    continue from a checkpoint
    Trainer._step      fetch, update, settle         Trainer._settle    guard and log a step whose numbers are known

What a step computes is in step.py; what a checkpoint holds in state.py; how it is written in checkpoint*.py.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fat5.data import PackedBatch
from fat5.errors import FAT5Error
from fat5.optim import learning_rate
from fat5.train.checkpoint import state
from fat5.train.checkpoint.saving import Saver
from fat5.train.checkpoint.store import TRAINER, CheckpointStore, Snapshot, read_trainer_state, to_text
from fat5.train.config import PretrainConfig
from fat5.train.cost.flops import ModelShape, peak_flops
from fat5.train.evaluation import Evaluation
from fat5.train.guards import MOST_IN_A_ROW, NonFiniteError, StepRecord, dump_examples
from fat5.train.log.display import RunDisplay
from fat5.train.log.metrics import EventLog, MetricsLog, name_lines
from fat5.train.log.plots import LivePlot
from fat5.train.log.tensorboard import TensorBoard
from fat5.train.run_directory import RunDirectory
from fat5.train.signals import RunStopped, StopRequest
from fat5.train.step import StepResult, StepRunner


@dataclass
class Pending:
    """A step that was started, and what is to be logged of it."""

    record: StepRecord
    result: StepResult
    row: dict[str, Any]


class Trainer:
    """Carries a run from where it stands to its last step.

    Args:
        config: resolved.
        run: the run's folder, locked.
        model: in training mode, on its device.
        runner: makes the steps.
        loader: endless iterable of `PackedBatch` with `state_dict`, `load_state_dict` and `micro_batches_per_step`.
        evaluation: scores the model on the validation stream, and calls its argument `before_batch` between batches.
        configuration: what a later run is compared with (see compare.py); goes into each checkpoint.
        model_config: text of the model's config.json, for the checkpoints.
        plot: redraws loss.png.
    """

    def __init__(
        self,
        config: PretrainConfig,
        run: RunDirectory,
        model: nn.Module,
        runner: StepRunner,
        loader: Any,
        evaluation: Callable[..., Evaluation],
        configuration: dict[str, Any],
        model_config: str,
        plot: LivePlot,
    ) -> None:
        self.config, self.run_directory, self.model, self.runner = config, run, model, runner
        self.loader, self.evaluation = loader, evaluation
        self.configuration, self.model_config, self.plot = configuration, model_config, plot
        self.progress = state.Progress()
        self.display = RunDisplay(config.steps, 0, config.log_every, config.eval_every)
        self.events = EventLog(run.events)
        self.metrics = MetricsLog(run.metrics, on_failure=self._warn)
        self.store = CheckpointStore(run.checkpoints, config.keep_last, config.keep_best, config.keep_every)
        self.saver = Saver(self.store, self._snapshot, self._warn)
        self.stop = StopRequest()
        self.tensorboard: TensorBoard | None = None
        self.shape = ModelShape.of(model.config)
        self.peak = peak_flops(runner.device, runner.precision.name)
        self._pending: deque[Pending] = deque()
        self._batches: Iterator[PackedBatch] = iter(())
        self._rewinds = 0
        self._began = time.perf_counter()

    def run(self) -> None:
        """Trains to the last step.

        Raises:
            RunStopped: a signal asked to stop; the state is saved.
            NonFiniteError: loss or gradient was not finite, and `on_nan` says abort (or it happened too often).
            CheckpointError: checkpoints could not be written, again and again.
        """
        progress, steps = self.progress, self.config.steps
        self.display = RunDisplay(steps, progress.step, self.config.log_every, self.config.eval_every)
        if self.config.tensorboard:
            self.tensorboard = TensorBoard(self.run_directory.path / "tensorboard", progress.step, self._warn)
        self._began = time.perf_counter() - progress.seconds
        with self.stop, self.display:
            self._batches = iter(self.loader)
            try:
                if self._evaluate_if_due() and progress.step:
                    self._save_if_due()  # a signal stopped the run between the step and its evaluation
                while progress.step < steps:
                    self._step()
                    self._leave_if_asked()
                    self._evaluate_if_due()
                    self._save_if_due()
                    self.plot.poke()
                self.saver.finish()
            finally:
                close = getattr(self._batches, "close", None)
                if close is not None:
                    close()
                self.store.wait()
                if self.tensorboard is not None:
                    self.tensorboard.close()

    def restore(self, folder: Path, keep_data: bool = False) -> None:
        """Takes over the state of a checkpoint that was verified; `keep_data` leaves the data where it stands."""
        content = read_trainer_state(folder)
        state.restore_weights(self.model, folder)
        state.restore_optimizer(self.runner.optimizer, self.model, folder)
        self.runner.precision.load_state_dict(content["loss_scale"])
        if not keep_data:
            self.loader.load_state_dict(content["data"])
        state.restore_progress(self.progress, content["progress"], folder / TRAINER)
        state.restore_random_state(folder)

    def cut_log(self, step: int) -> None:
        """Takes the rows after `step` out of metrics.jsonl, and lines that are not rows, which the user is told of."""
        bad = self.metrics.rewind(step, self.run_directory.discarded)
        if bad:
            self._warn(f"metrics.jsonl: {name_lines(bad)}; moved to {self.run_directory.discarded.name}")

    def _step(self) -> None:
        progress, began = self.progress, time.perf_counter()
        batches = [next(self._batches) for _ in range(self.loader.micro_batches_per_step)]
        waited = time.perf_counter() - began
        rate = learning_rate(self.config.schedule, progress.step, self.config.steps)
        try:
            result = self.runner.run(batches, rate)
        except torch.cuda.OutOfMemoryError as error:
            raise _out_of_memory(batches[0]) from error
        progress.step += 1
        row = self._count(batches, rate)
        self._pending.append(Pending(StepRecord.of(progress.step, batches), result, row))
        known = self._pending.popleft() if len(self._pending) > int(self.runner.deferred) else None
        numbers = known.result.read() if known is not None else None
        took = time.perf_counter() - began
        progress.step_seconds += took
        progress.seconds = time.perf_counter() - self._began
        row["tokens_per_second"] = row["step_tokens"] / took
        row["data_wait_fraction"] = waited / took
        row["mfu"] = row.pop("flops") / took / self.peak if self.peak else None
        row["seconds"] = progress.seconds
        if known is not None and numbers is not None:
            self._settle(known, *numbers)

    def _count(self, batches: list[PackedBatch], rate: float) -> dict[str, Any]:
        """Adds a step's batches to the totals; the part of its row that needs no device."""
        progress = self.progress
        encoder = sum(int(batch.cu_seqlens[-1]) for batch in batches)
        decoder = sum(batch.num_items for batch in batches)
        encoder_room = sum(batch.input_ids.numel() for batch in batches)
        decoder_room = sum(batch.labels.numel() for batch in batches)
        raw = sum(batch.tokens for batch in batches)
        progress.tokens += encoder + decoder
        progress.raw_tokens += raw
        progress.encoder_tokens += encoder
        progress.decoder_tokens += decoder
        progress.encoder_room += encoder_room
        progress.decoder_room += decoder_room
        flops = sum(
            self.shape.training_flops(batch.cu_seqlens.diff(), batch.decoder_cu_seqlens.diff()) for batch in batches
        )
        return {
            "step": progress.step,
            "lr": self.runner.optimizer.param_groups[0]["peak_lr"] * rate,
            "tokens": progress.tokens,
            "raw_tokens": progress.raw_tokens,
            "step_tokens": encoder + decoder,
            "encoder_fill": encoder / encoder_room,
            "decoder_fill": decoder / decoder_room,
            "flops": flops,
        }

    def _settle(self, pending: Pending, loss: float, norm: float, losses: list[float]) -> None:
        """Logs a step, and acts where it was not finite."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        row = {"kind": "train", **pending.row, "loss": _json(loss), "grad_norm": _json(norm)}
        if pending.result.loss_scale is not None:
            row["loss_scale"] = pending.result.loss_scale
        if not finite:
            row["skipped"] = True
        self.metrics.write(row)
        self.display.train(row)
        if self.tensorboard is not None and row["step"] % self.config.log_every == 0:
            self.tensorboard.write(row)
        if self.runner.broken(loss, norm, pending.result.loss_scale):
            self._broken(pending.record, loss, norm, losses)
        else:
            self.progress.broken_in_a_row = 0

    def _settle_all(self) -> None:
        while self._pending:
            pending = self._pending.popleft()
            self._settle(pending, *pending.result.read())

    def _broken(self, record: StepRecord, loss: float, norm: float, losses: list[float]) -> None:
        """What `on_nan` says, for a step whose update was not made."""
        dump = dump_examples(self.run_directory.path, record, losses, norm)
        what = f"loss {loss} and gradient norm {norm} at step {record.step}"
        self.events.write("nonfinite", step=record.step, action=self.config.on_nan, examples=dump.name)
        self.progress.broken_in_a_row += 1
        if self.config.on_nan == "abort" or self.progress.broken_in_a_row > MOST_IN_A_ROW:
            times = f" ({self.progress.broken_in_a_row} steps in a row)" if self.progress.broken_in_a_row > 1 else ""
            raise NonFiniteError(
                f"{what}{times}; the update was not made",
                where=self.run_directory.path,
                hint=f"The examples are in {dump.name}; lower the learning rate, or set on_nan to skip or rewind",
            )
        if self.config.on_nan == "skip":
            self._warn(f"{what}: step skipped, its examples are in {dump.name}")
        else:
            self._rewind(what, dump.name)

    def _rewind(self, what: str, dump: str) -> None:
        """Back to the last checkpoint's weights, on with the data that follows."""
        self.saver.settle()
        choice = self.store.choose(self.config.strict)
        self._rewinds += 1
        if choice is None or self._rewinds > MOST_IN_A_ROW:
            reason = (
                "there is no checkpoint to rewind to" if choice is None else f"rewound {MOST_IN_A_ROW} times in vain"
            )
            raise NonFiniteError(
                f"{what}; {reason}",
                where=self.run_directory.path,
                hint=f"The examples are in {dump}; lower the learning rate",
            )
        broken = self.progress.broken_in_a_row
        self._pending.clear()
        self.restore(choice.folder, keep_data=True)
        self.progress.broken_in_a_row = broken
        self.cut_log(self.progress.step)
        self._warn(f"{what}: rewound to step {self.progress.step}; its examples are in {dump}")

    def _evaluate_if_due(self) -> bool:
        """Evaluates before the first step, every `eval_every` steps and after the last; True if it did."""
        due = self.progress.step % self.config.eval_every == 0 or self.progress.step == self.config.steps
        if not due or self.progress.evaluated_at == self.progress.step:
            return False
        before = self.progress.step
        self._settle_all()
        if self.progress.step != before:  # rewound
            return False
        began = time.perf_counter()
        row = self.evaluation(before_batch=self._leave_if_asked).row(before)
        self.progress.evaluated_at = before
        self.progress.first_evaluation = self.progress.first_evaluation or row
        self.progress.last_evaluation = row
        self.metrics.write(row)
        self.display.evaluation(row, time.perf_counter() - began)
        if self.tensorboard is not None:
            self.tensorboard.write(row)
        return True

    def _save_if_due(self) -> None:
        step = self.progress.step
        scheduled = step % self.config.save_every == 0 or step == self.config.steps
        if not scheduled and not self.saver.retry_due():
            return
        self._settle_all()
        if self.progress.step == step:
            self._save()

    def _save(self) -> None:
        self.metrics.flush_to_disk()
        self.saver.save()
        self._rewinds = 0

    def _leave_if_asked(self) -> None:
        """Saves and leaves if a signal asked for it."""
        if self.stop.received is None:
            return
        self._settle_all()
        self._save()
        self.saver.finish()
        stopped = RunStopped(self.stop.received, self.progress.step)
        self.events.write("stopped", step=self.progress.step, signal=stopped.signal.name)
        raise stopped

    def _snapshot(self) -> Snapshot:
        progress = self.progress
        optimizer, optimizer_facts = state.capture_optimizer(self.runner.optimizer, self.model)
        random, random_facts = state.capture_random_state()
        content = {
            "progress": asdict(progress),
            "data": self.loader.state_dict(),
            "loss_scale": self.runner.precision.state_dict(),
            "configuration": self.configuration,
        }
        evaluated = progress.last_evaluation if progress.evaluated_at == progress.step else None
        return Snapshot(
            step=progress.step,
            tensors={
                state.WEIGHTS: state.capture_weights(self.model),
                state.OPTIMIZER: optimizer,
                state.RNG: random,
            },
            documents={
                "config.json": self.model_config,
                state.OPTIMIZER_FACTS: to_text(optimizer_facts),
                state.RNG_FACTS: to_text(random_facts),
                TRAINER: to_text(content),
            },
            val_loss=evaluated["loss"] if evaluated else None,
        )

    def _warn(self, line: str) -> None:
        self.display.warn(line)
        self.events.write("warning", line=line)


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _out_of_memory(batch: PackedBatch) -> FAT5Error:
    """Shapes, peak and what to change."""
    peak = torch.cuda.max_memory_allocated() / 2**30
    return FAT5Error(
        f"out of GPU memory in a step with {batch.input_ids.numel():,} encoder and {batch.labels.numel():,} decoder "
        f"tokens a micro-batch (peak {peak:.1f} GiB)",
        hint="Lower data.packs_per_micro_batch or the pack's tokens, or set gradient_checkpointing",
    )
