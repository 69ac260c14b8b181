"""Shows a run on stderr: a live bar on a terminal, a line now and then in a log file."""

import os
import sys
import time
from collections.abc import Iterable
from statistics import median
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from fat5.train.log.metrics import scores_of

TIMED_STEPS = 4
"""Steps from which the duration is estimated, after the first, which compiles; fewer if they are slow."""

CLEAR = "\r\x1b[K"

LINE_SECONDS = 30.0
"""With slow steps, a log gets a line at least this often."""


class RunDisplay:
    """Shows the steps of a run on stderr. A context manager.

    Args:
        every: steps between two lines where stderr is not a terminal.
        eval_every: steps between two evaluations, whose time counts too.
        mfu: show it; a CPU's is measured against a product of matrices, which says little.
        compiled: the first evaluation compiles too.
        silent: show nothing, in a process that another one speaks for.
    """

    def __init__(
        self, verb: str, steps: int, every: int, eval_every: int, mfu: bool, compiled: bool, silent: bool = False
    ) -> None:
        self.steps, self.every, self.eval_every, self.mfu = steps, every, eval_every, mfu
        self._validation: float | None = None
        self._step_seconds: list[float] = []
        self._evaluation_seconds, self._compiling = 0.0, compiled
        self._told = False
        self._last_line = time.perf_counter()
        self._console = Console(stderr=True, highlight=False)
        self._live, self._silent = os.isatty(2) and not silent, silent
        self._bar = _Bar(self._console, live=self._live)
        self._task = self._bar.add_task(verb, total=steps, left="")

    def __enter__(self) -> "RunDisplay":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, step: int, evaluation: dict[str, Any] | None) -> None:
        """Sets the step and the last evaluation (a row of metrics.jsonl) of a run that is continued."""
        self._validation = evaluation["loss"] if evaluation else None
        self._bar.update(self._task, completed=step)

    def show(self, row: dict[str, Any], seconds: float = 0.0) -> None:
        """Shows a row of metrics.jsonl; `seconds` is how long an evaluation took."""
        if row["kind"] == "eval":
            self._validation = row["loss"]
            self._evaluation_seconds, self._compiling = 0.0 if self._compiling else seconds, False
            told = [f"validation loss {row['loss']:.4f}"]
            told += [] if row["accuracy"] is None else [f"accuracy {row['accuracy']:.1%}"]
            told += [f"{name} {value:.4g}" for name, value in scores_of(row).items()]
            self.say(f"step {row['step']}: {', '.join(told)}")
        else:
            self._train(row)

    def warn(self, line: str) -> None:
        """Prints a warning."""
        self.say(f"warning: {line}", style="bold yellow")

    def say(self, line: str, style: str | None = None) -> None:
        """Prints a line."""
        self._last_line = time.perf_counter()
        if self._silent:
            return
        if self._live:
            self._console.print(line, style=style, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the log

    def _train(self, row: dict[str, Any]) -> None:
        step = row["step"]
        self._step_seconds.append(row["step_tokens"] / row["tokens_per_second"])
        left = _clock(self._left(step))
        if self._live:
            self._bar.numbers = self._numbers(row)
            self._bar.update(self._task, completed=step, left=left)
        elif step % self.every == 0 or step == self.steps or time.perf_counter() - self._last_line > LINE_SECONDS:
            self.say(f"step {step}/{self.steps}  {self._numbers(row)}  {left} left")
        timed = self._step_seconds[1:]
        if not self._told and step < self.steps and (len(timed) == TIMED_STEPS or sum(timed) > LINE_SECONDS):
            self._told = True
            self.say(f"time    about {left} for the {self.steps - step:,} steps that are left")

    def _numbers(self, row: dict[str, Any]) -> str:
        parts = ["loss not finite" if row["loss"] is None else f"loss {row['loss']:.4f}"]
        if self._validation is not None:
            parts.append(f"validation {self._validation:.4f}")
        parts += [f"lr {row['lr']:.3g}", f"{row['tokens_per_second']:,.0f} tokens/s"]
        if self.mfu and row.get("mfu") is not None:
            parts.append(f"MFU {row['mfu']:.0%}")
        return "  ".join(parts)

    def _left(self, step: int) -> float:
        """Seconds to the end of the run: its steps at the speed of the last ones, and its evaluations.

        The median: the second and third step of a compiled run record it as a CUDA graph.
        """
        lately = self._step_seconds[1:][-max(TIMED_STEPS, self.every) :] or self._step_seconds
        evaluations = self.steps // self.eval_every - step // self.eval_every + (self.steps % self.eval_every > 0)
        return (self.steps - step) * median(lately) + evaluations * self._evaluation_seconds


class CountDisplay:
    """Shows on stderr how many of some things (`noun`, in the plural) are predicted, the rate and the time left: a live
    line on a terminal, else a line at times. A context manager.
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._live = os.isatty(2)
        self._began = self._last_line = time.perf_counter()
        self._before: int | None = None

    def __enter__(self) -> "CountDisplay":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live and self._before is not None:
            self._write(CLEAR)

    def show(self, done: int, total: int) -> None:
        """Shows a count; the first one is what an earlier attempt had done."""
        now = time.perf_counter()
        if self._before is None:
            self._before, self._began = done, now
        if not self._live and now - self._last_line < LINE_SECONDS:
            return
        self._last_line = now
        line = f"predict {done:,} of {total:,} {self.noun}"
        made, took = done - self._before, now - self._began
        if made:
            line += f"  {made / took:,.3g} a second  {_clock((total - done) * took / made)} left"
        self._write(f"{CLEAR}{line}" if self._live else f"{line}\n")

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


class _Bar(Progress):
    """A bar as wide as the terminal, and the numbers of the last step on a line below it."""

    def __init__(self, console: Console, live: bool) -> None:
        self.numbers = ""
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left"),
            console=console,
            disable=not live,
            refresh_per_second=2,
            expand=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.numbers, no_wrap=True, overflow="ellipsis")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
