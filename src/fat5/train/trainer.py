"""The training loop: step, guard, log, evaluate, save, and leave or go back in good order.

    Trainer.run        the loop                      Trainer.restore    continue from a checkpoint
    Trainer._step      fetch, update, settle         Trainer._settle    guard and log a step whose numbers are known

step.py computes a step; checkpoint/state.py says what a checkpoint contains, store.py when it is written.
"""

import math
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fat5.data import PackedBatch
from fat5.optim import learning_rate
from fat5.train.checkpoint.generators import gather_random_states, restore_generators
from fat5.train.checkpoint.state import (
    TRAINER,
    RunState,
    capture,
    read_trainer_state,
    restore,
    restore_weights,
    to_text,
)
from fat5.train.checkpoint.store import CheckpointStore, Choice, Saver, Snapshot
from fat5.train.cost.flops import peak_flops, training_flops
from fat5.train.evaluation import Scorer
from fat5.train.guards import (
    MOST_IN_A_ROW,
    NonFiniteError,
    dump_examples,
    gather_examples,
    memory_told,
    sigmas_above,
)
from fat5.train.log.display import RunDisplay
from fat5.train.log.metrics import EventLog, MetricsLog, name_lines
from fat5.train.log.plots import LivePlot
from fat5.train.log.trackers import Trackers
from fat5.train.run_directory import RunDirectory
from fat5.train.signals import LAUNCHER_ECHO, RunStopped, StopRequest
from fat5.train.step import StepResult, StepRunner
from fat5.train.task import Task


@dataclass
class Pending:
    """A step whose numbers are still on the device, and the rest of its row."""

    result: StepResult
    row: dict[str, Any]
    pieces: list[list[int]]
    """Ids of each micro-batch"""


class Trainer:
    """Trains from the current step to the last one, in a locked folder."""

    def __init__(self, task: Task, folder: RunDirectory, model: Any, runner: StepRunner, plot: LivePlot) -> None:
        self.task, self.folder, self.model, self.runner, self.plot = task, folder, model, runner, plot
        self.config, self.loader, self.world = task.config, task.loader, runner.world
        config = self.config
        self.identity = task.identity()
        self.model_config = _config_text(model)
        self.state = RunState()
        mfu, main = runner.device.type == "cuda", self.world.is_main
        self.display = RunDisplay(
            task.verb, config.steps, config.log_every, config.eval_every, mfu, runner.compiled, silent=not main
        )
        self.events = EventLog(folder.events if main else None)
        self.metrics = MetricsLog(folder.metrics, on_failure=self._warn)
        self.store = CheckpointStore(folder.checkpoints, config.keep_last, config.keep_best, config.keep_every)
        self.saver = Saver(self.store, self._snapshot, self._warn, self.world.broadcast)
        self.stop = StopRequest(LAUNCHER_ECHO) if self.world.size > 1 else StopRequest()
        self.trackers: Trackers | None = None
        self.peak = peak_flops(runner.device, runner.precision.name) if main else None
        self._pending: deque[Pending] = deque()
        self._batches: Iterator[PackedBatch] = iter(())
        self._rewinds = 0
        self._doing = "the first step"
        self._began = time.perf_counter()

    def run(self) -> None:
        """Trains to the last step.

        Raises:
            RunStopped: a signal asked to stop; the state is saved.
            NonFiniteError: loss or gradient was not finite, and `on_nan` says abort (or it happened too often).
            CheckpointError: checkpoints could not be written, again and again.
        """
        config, state = self.config, self.state
        self.display.begin(state.step, state.last_evaluation)
        if self.world.is_main:
            names, plain, say = config.trackers(), config.to_dict(), self.display.say
            self.trackers = Trackers(names, self.folder.path, state.step, plain, config.log_every, say, self._warn)
        self._began = time.perf_counter() - state.seconds
        with self.stop, self.display, memory_told(self.runner.device, lambda: self._doing):
            self._batches = iter(self.loader)
            try:
                if self._evaluate_if_due() and state.step:
                    self._save_if_due()  # a signal stopped the run between the step and its evaluation
                while not self.is_over:
                    self._step()
                    self._leave_if_asked()
                    self._evaluate_if_due()
                    self._save_if_due()
                    if self.world.is_main:
                        self.plot.poke()
                self.saver.finish()
                if state.stopped_early:
                    self.display.say(f"stopped early: no evaluation since that of step {state.best_step} was better")
            finally:
                close = getattr(self._batches, "close", None)
                if close is not None:
                    close()
                self.saver.wait()
                if self.trackers is not None:
                    self.trackers.close()

    def restore(self, folder: Path, keep_data: bool = False) -> None:
        """Loads a verified checkpoint; `keep_data` leaves the position in the data as it is."""
        content = read_trainer_state(folder)
        restore(self.model, self.runner.parallel, self.runner.optimizer, folder)
        restore_generators(folder, self.world.rank, self.config.seed, content["progress"].get("step", 0))
        self.runner.precision.load_state_dict(content["loss_scale"])
        if not keep_data:
            self.loader.load_state_dict(content["data"])
        self.state.restore(content["progress"], folder / TRAINER)

    @property
    def is_over(self) -> bool:
        """True after the last step, or where the run stopped early."""
        return self.state.step >= self.config.steps or self.state.stopped_early

    def take_best(self) -> None:
        """Gives the model the weights of the best checkpoint that is kept; of the last step if none has a rank."""
        self.saver.settle()
        step = self.world.broadcast(self.store.best() if self.world.is_main else None)
        if step is not None and step != self.state.step:
            restore_weights(self.model, self.store.path(step))
            self.display.say(f"the model takes the weights of step {step}, the best evaluation")

    def cut_log(self, step: int) -> None:
        """Moves the rows after `step`, and evaluations that the state lacks, out of metrics.jsonl; lines that are not
        rows too, with a warning.
        """
        discarded, evaluated_at = self.folder.discarded, self.state.evaluated_at
        bad = self.metrics.rewind(step, discarded, evaluated_at) if self.world.is_main else []
        if bad:
            self._warn(f"metrics.jsonl: {name_lines(bad)}; moved to {self.folder.discarded.name}")

    def _step(self) -> None:
        state, began = self.state, time.perf_counter()
        batches = [next(self._batches) for _ in range(self.loader.micro_batches_per_step)]
        waited = time.perf_counter() - began
        shapes = f"{batches[0].input_ids.numel():,} encoder and {batches[0].labels.numel():,} decoder tokens"
        self._doing = f"step {state.step + 1} with {shapes} a micro-batch"
        rate = learning_rate(self.config.schedule, state.step, self.config.steps)
        result = self.runner.run(batches, rate)
        state.step += 1
        row = self._count(batches, rate)
        pieces = [batch.piece[: batch.num_examples].tolist() for batch in batches]
        self._pending.append(Pending(result, row, pieces))
        known = self._pending.popleft() if len(self._pending) > int(self.runner.deferred) else None
        numbers = known.result.read() if known is not None else None
        took = time.perf_counter() - began
        state.step_seconds += took
        state.seconds = time.perf_counter() - self._began
        row["tokens_per_second"] = row["step_tokens"] / took
        row["data_wait_fraction"] = waited / took
        row["mfu"] = row.pop("flops") / took / self.peak if self.peak else None
        row["seconds"] = state.seconds
        if known is not None and numbers is not None:
            self._settle(known, *numbers)

    def _count(self, batches: list[PackedBatch], rate: float) -> dict[str, Any]:
        """Adds a step's batches to the totals; the part of its row that needs no device."""
        state = self.state
        counts = (
            sum(int(batch.cu_seqlens[-1]) for batch in batches),
            sum(batch.num_items for batch in batches),
            sum(batch.input_ids.numel() for batch in batches),
            sum(batch.labels.numel() for batch in batches),
            sum(batch.tokens for batch in batches),
        )
        encoder, decoder, encoder_room, decoder_room, raw = self.world.all_sum(torch.tensor(counts)).tolist()
        state.tokens += encoder + decoder
        state.raw_tokens += raw
        state.encoder_tokens += encoder
        state.decoder_tokens += decoder
        state.encoder_room += encoder_room
        state.decoder_room += decoder_room
        flops = sum(
            training_flops(self.model.config, batch.cu_seqlens.diff(), batch.decoder_cu_seqlens.diff())
            for batch in batches
        )
        return {
            "step": state.step,
            "lr": self.runner.optimizer.param_groups[0]["peak_lr"] * rate,
            "tokens": state.tokens,
            "raw_tokens": state.raw_tokens,
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
        self._record(row)
        if self.runner.broken(loss, norm, pending.result.loss_scale):
            self._broken(pending, loss, norm, losses)
        else:
            self.state.broken_in_a_row = 0
            self._notice_spike(pending, loss, losses)

    def _settle_all(self) -> None:
        while self._pending:
            pending = self._pending.popleft()
            self._settle(pending, *pending.result.read())

    def _broken(self, pending: Pending, loss: float, norm: float, losses: list[float]) -> None:
        """What `on_nan` says, for a step whose update was not made."""
        step = pending.row["step"]
        dump = dump_examples(self.folder.path, step, pending.pieces, losses, norm, self.world)
        what = f"loss {loss} and gradient norm {norm} at step {step}"
        self.events.write("nonfinite", step=step, action=self.config.on_nan, examples=dump.name)
        self.state.broken_in_a_row += 1
        if self.config.on_nan == "abort" or self.state.broken_in_a_row > MOST_IN_A_ROW:
            times = f" ({self.state.broken_in_a_row} steps in a row)" if self.state.broken_in_a_row > 1 else ""
            raise NonFiniteError(
                f"{what}{times}; the update was not made",
                where=self.folder.path,
                hint=f"The examples are in {dump.name}; lower the learning rate, or set on_nan to skip or rewind",
            )
        if self.config.on_nan == "skip":
            self._warn(f"{what}: step skipped, its examples are in {dump.name}")
        else:
            self._rewind(what, dump.name)

    def _notice_spike(self, pending: Pending, loss: float, losses: list[float]) -> None:
        """Puts a loss far above those before it on record with its examples, and acts as `on_spike` says."""
        sigmas = sigmas_above(self.state, loss, self.config.spike_sigma)
        if sigmas is None:
            return
        step, action = pending.row["step"], self.config.on_spike
        examples = gather_examples(pending.pieces, losses, self.world)
        self.events.write("spike", step=step, loss=loss, sigmas=sigmas, action=action, micro_batches=examples)
        what = f"loss {loss:.4f} at step {step} lies {sigmas:.1f} standard deviations above those before it"
        if action == "warn":
            self._warn(f"{what}; its examples are in {self.folder.events.name}")
        else:
            self._rewind(what, self.folder.events.name)

    def _rewind(self, what: str, dump: str) -> None:
        """Back to the last checkpoint's weights, on with the data that follows."""
        self.saver.settle()
        choice = Choice.of_main(lambda: self.store.choose(self.config.strict), self.world)
        if choice is None and not self.state.broken_in_a_row:  # a spike, after which a run can go on
            self._warn(f"{what}; there is no checkpoint to rewind to; its examples are in {dump}")
            return
        self._rewinds += 1
        if choice is None or self._rewinds > MOST_IN_A_ROW:
            reason = (
                "there is no checkpoint to rewind to" if choice is None else f"rewound {MOST_IN_A_ROW} times in vain"
            )
            raise NonFiniteError(
                f"{what}; {reason}",
                where=self.folder.path,
                hint=f"The examples are in {dump}; lower the learning rate",
            )
        broken = self.state.broken_in_a_row
        self._pending.clear()
        self.restore(choice.folder, keep_data=True)
        self.state.broken_in_a_row = broken
        self.cut_log(self.state.step)
        self._warn(f"{what}: rewound to step {self.state.step}; its examples are in {dump}")

    def _evaluate_if_due(self) -> bool:
        """Evaluates before the first step, every `eval_every` steps and after the last; True if it did."""
        due = self.state.step % self.config.eval_every == 0 or self.state.step == self.config.steps
        if not due or self.state.evaluated_at == self.state.step:
            return False
        before = self.state.step
        self._settle_all()
        if self.state.step != before:  # rewound
            return False
        self._doing = f"the evaluation of step {before}"
        began = time.perf_counter()
        row = {"kind": "eval", "step": before, **self.task.evaluate(self.scorer())}
        self.state.evaluated_at = before
        self.state.first_evaluation = self.state.first_evaluation or row
        self.state.last_evaluation = row
        self.state.note_rank(self.task.rank(row), self.config.patience)
        self._record(row, time.perf_counter() - began)
        return True

    def scorer(self) -> Scorer:
        """The model for an evaluation; a stop signal ends the evaluation between two batches."""
        forward, precision = self.runner.forward, self.runner.precision
        gathered = self.runner.gathered
        return Scorer(self.model, precision, self.world, forward, self._leave_if_asked, self.stop.is_asked, gathered)

    def _record(self, row: dict[str, Any], seconds: float = 0.0) -> None:
        """Writes and shows a row; `seconds` is how long an evaluation took."""
        if not self.world.is_main:
            return
        self.metrics.write(row)
        self.display.show(row, seconds)
        if self.trackers is not None:
            self.trackers.write(row)

    def _save_if_due(self) -> None:
        step = self.state.step
        scheduled = step % self.config.save_every == 0 or self.is_over
        if not scheduled and not self.world.agree(True if self.saver.retry_due() else None):
            return
        self._settle_all()
        if self.state.step == step:
            self._save()

    def _save(self) -> None:
        if self.world.is_main:
            self.metrics.flush_to_disk()
        self._doing = f"the save of step {self.state.step}"
        self.saver.save()
        self._rewinds = 0

    def _leave_if_asked(self) -> None:
        """Saves and leaves if a signal asked for it."""
        signum = self.world.agree(self.stop.received)
        if signum is None:
            return
        self._settle_all()
        self._save()
        self.saver.finish()
        stopped = RunStopped(signum, self.state.step)
        self.events.write("stopped", step=self.state.step, signal=stopped.signal.name)
        raise stopped

    def _snapshot(self) -> Snapshot | None:
        state = self.state
        runner, keep = self.runner, self.world.is_main
        runner.parallel.check()
        random_states = gather_random_states(self.world)
        tensors, documents = capture(self.model, runner.parallel, runner.optimizer, random_states, keep)
        if not keep:
            return None
        content = {
            "progress": asdict(state),
            "data": self.loader.state_dict(),
            "loss_scale": runner.precision.state_dict(),
            "configuration": self.identity,
        }
        documents |= {"config.json": self.model_config, TRAINER: to_text(content)}
        evaluated = state.last_evaluation if state.evaluated_at == state.step else None
        return Snapshot(state.step, tensors, documents, self.task.rank(evaluated) if evaluated else None)

    def _warn(self, line: str) -> None:
        self.display.warn(line)
        self.events.write("warning", line=line)


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _config_text(model: Any) -> str:
    """The model's config.json."""
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP2 derives a class
    model.config.dtype = None  # that of the files it was read from, which need not be the run's
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        return (Path(folder) / "config.json").read_text()
