"""What a person sees of a run: a live bar on a terminal, sparse lines in a log."""

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunDisplay:
    """Shows the steps of a run on stderr. A context manager.

    Args:
        steps: of the whole run.
        start: the step it continues from.
        every: steps between two lines where stderr is not a terminal.
    """

    def __init__(self, steps: int, start: int, every: int) -> None:
        self.steps, self.every = steps, every
        self._console = Console(stderr=True, highlight=False)
        self._live = os.isatty(2)
        self._began, self._start = time.perf_counter(), start
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
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        numbers = f"loss {loss}  {row['tokens_per_second']:,.0f} tokens/s"
        if row.get("mfu") is not None:
            numbers += f"  MFU {row['mfu']:.0%}"
        if self._live:
            self._progress.update(self._task, completed=row["step"], numbers=numbers)
        elif row["step"] % self.every == 0 or row["step"] == self.steps:
            left = (time.perf_counter() - self._began) / max(1, row["step"] - self._start) * (self.steps - row["step"])
            self._line(f"step {row['step']}/{self.steps}  {numbers}  lr {row['lr']:.3g}  {_clock(left)} left")

    def evaluation(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl with kind eval."""
        self.say(f"step {row['step']}: validation loss {row['loss']:.4f}, accuracy {row['accuracy']:.1%}")

    def say(self, line: str) -> None:
        """A line of its own."""
        self._line(line)

    def warn(self, line: str) -> None:
        """A line that should not be missed."""
        self._line(f"warning: {line}", style="bold yellow")

    def _line(self, line: str, style: str | None = None) -> None:
        if self._live:
            self._console.print(line, style=style, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the log


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
