"""What a person sees of a run: a live bar on a terminal, sparse lines in a log."""

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

TIMED_STEPS = 4
"""Steps that the expected time is told from, after the first, which compiles; fewer where they are slow."""

LINE_SECONDS = 30.0
"""Longest time without a line in a log, from one slow step to the next."""


class RunDisplay:
    """Shows the steps of a run on stderr. A context manager.

    Args:
        steps: of the whole run.
        start: the step it continues from.
        every: steps between two lines where stderr is not a terminal.
        eval_every: steps between two evaluations, whose time counts too.
    """

    def __init__(self, steps: int, start: int, every: int, eval_every: int) -> None:
        self.steps, self.every, self.eval_every = steps, every, eval_every
        self._step_seconds: list[float] = []
        self._evaluation_seconds = 0.0
        self._told = False
        self._last_line = time.perf_counter()
        self._console = Console(stderr=True, highlight=False)
        self._live = os.isatty(2)
        self._progress = Progress(
            TextColumn("[bold]pretrain"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
            refresh_per_second=2,
        )
        self._task = self._progress.add_task("pretrain", total=steps, completed=start, numbers="")

    def __enter__(self) -> "RunDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def train(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl with kind train."""
        self._step_seconds.append(row["step_tokens"] / row["tokens_per_second"])
        left = self._left(row["step"])
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        numbers = f"loss {loss}  {row['tokens_per_second']:,.0f} tokens/s"
        if row.get("mfu") is not None:
            numbers += f"  MFU {row['mfu']:.0%}"
        if self._live:
            self._progress.update(self._task, completed=row["step"], numbers=numbers)
        elif (
            row["step"] % self.every == 0
            or row["step"] == self.steps
            or time.perf_counter() - self._last_line > LINE_SECONDS
        ):
            self._line(f"step {row['step']}/{self.steps}  {numbers}  lr {row['lr']:.3g}  {_clock(left)} left")
        timed = self._step_seconds[1:]
        if not self._told and row["step"] < self.steps and (len(timed) == TIMED_STEPS or sum(timed) > LINE_SECONDS):
            self._told = True
            self._line(f"time    about {_clock(left)} for the {self.steps - row['step']:,} steps that are left")

    def _left(self, step: int) -> float:
        """Seconds to the end of the run: its steps at the speed of the last ones, and its evaluations."""
        lately = self._step_seconds[1:][-max(TIMED_STEPS, self.every) :] or self._step_seconds
        evaluations = self.steps // self.eval_every - step // self.eval_every + (self.steps % self.eval_every > 0)
        return (self.steps - step) * sum(lately) / len(lately) + evaluations * self._evaluation_seconds

    def evaluation(self, row: dict[str, Any], seconds: float) -> None:
        """A row of metrics.jsonl with kind eval, and how long it took."""
        self._evaluation_seconds = seconds
        self.say(f"step {row['step']}: validation loss {row['loss']:.4f}, accuracy {row['accuracy']:.1%}")

    def say(self, line: str) -> None:
        """A line of its own."""
        self._line(line)

    def warn(self, line: str) -> None:
        """A line that should not be missed."""
        self._line(f"warning: {line}", style="bold yellow")

    def _line(self, line: str, style: str | None = None) -> None:
        self._last_line = time.perf_counter()
        if self._live:
            self._console.print(line, style=style, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the log


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
