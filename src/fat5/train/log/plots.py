"""loss.png: how a run goes, redrawn while it goes; and the comparison of several runs."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from fat5.errors import DataError, FAT5Error
from fat5.files import whole_file
from fat5.train.log.metrics import parts, read_rows, scores_of

Axis = Literal["step", "tokens", "hours"]
Rows = list[dict[str, Any]]

COST = 50
"""A drawing may start when this many times the last one's duration has passed: at most 2% of a core."""
LEAST_SECONDS = 10.0

INK, FAINT, PAPER = "#1f2933", "#d9dee4", "#ffffff"
COLOURS = ("#1769aa", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#008b8b", "#8b5a2b", "#708090")


def draw_run(metrics: Path, target: Path, title: str = "", reference: tuple[str, float] | None = None) -> None:
    """Draws one run: losses, validation by part, learning rate, gradient norm, throughput.

    Args:
        reference: label and loss of a line to compare with.
    """
    train, evals = _split(read_rows(metrics))
    figure = new_figure(12.5, 7.6)
    grid = figure.add_gridspec(2, 6, height_ratios=(1.5, 1))
    loss, divided = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    rate, norm, speed = (figure.add_subplot(grid[1, 2 * column : 2 * column + 2]) for column in range(3))
    steps = [row["step"] for row in train]
    span = _window(len(train))
    _curve(loss, steps, [_number(row["loss"]) for row in train], span, COLOURS[0], "train")
    _mark(loss, [row["step"] for row in evals], [row["loss"] for row in evals], COLOURS[1], "validation")
    if reference is not None:
        loss.axhline(reference[1], color=INK, linewidth=1, linestyle=":", label=reference[0])
    style_axes(loss, f"loss{_named(span)}", _unit(evals))
    draw_evaluations(divided, evals)
    rate.plot(steps, [row["lr"] for row in train], color=COLOURS[3], linewidth=1.6)
    style_axes(rate, "learning rate", "")
    norms = [_number(row["grad_norm"]) for row in train]
    _curve(norm, steps, norms, span, COLOURS[4])
    style_axes(norm, f"gradient norm{_named(span)}", "")
    positive = [value for value in norms if value > 0 and math.isfinite(value)]
    if positive and max(positive) > 10 * min(positive):
        norm.set_yscale("log")
    else:
        norm.set_ylim(bottom=0)
    _curve(speed, steps, [row["tokens_per_second"] for row in train], span, COLOURS[2])
    style_axes(speed, f"throughput{_named(span)}", "tokens a second")
    speed.set_ylim(bottom=0)
    for axes in (rate, norm, speed):
        axes.set_xlabel("step", color=INK, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, target, title)


def draw_comparison(runs: Sequence[Path], target: Path, x: Axis = "step") -> None:
    """Draws the training and validation losses of several runs over steps, tokens or hours.

    Raises:
        DataError: a folder without metrics, or two folders of one name.
    """
    figure = new_figure(12.5, 5.2)
    axes = figure.subplots(1, 2, sharey=True)
    names = _distinct(runs)
    logs = [_split(read_rows(run / "metrics.jsonl" if run.is_dir() else run)) for run in runs]
    span = _window(max((len(train) for train, _ in logs), default=0))
    for index, ((train, evals), name) in enumerate(zip(logs, names, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        places = {row["step"]: row["seconds"] / 3600 if x == "hours" else float(row[x]) for row in train}
        _curve(axes[0], list(places.values()), [_number(row["loss"]) for row in train], span, colour, name)
        held = [row for row in evals if row["step"] in places or row["step"] == 0]
        _mark(axes[1], [places.get(row["step"], 0) for row in held], [row["loss"] for row in held], colour, name)
    units = {_unit(evals) for _, evals in logs}
    style_axes(axes[0], f"training loss{_named(span)}", units.pop() if len(units) == 1 else "")
    style_axes(axes[1], "validation loss", "")
    for axis in axes:
        axis.set_xlabel(x, color=INK, fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=x != "hours")
    save_figure(figure, target, "")


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Exponential mean over about `window` values, unbiased at its start; values that are not finite are left out."""
    decay = 1 - 1 / max(1, window)
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(mean / weight if weight else math.nan)
    return smoothed


def draw_evaluations(axes: Any, evals: Rows) -> None:
    """The loss by part; where there is one part, which repeats the loss, the scores of the task, else the accuracy."""
    part = next((parts(row)[0] for row in evals), "part")
    names = list(dict.fromkeys(name for row in evals for name in parts(row)[1]))
    # Errors have another scale than scores between 0 and 1.
    scores = dict.fromkeys(name for row in evals for name in scores_of(row) if not name.endswith("_error"))
    if len(names) != 1 or part == "denoiser":
        curves = {name: {row["step"]: parts(row)[1].get(name, {}).get("loss") for row in evals} for name in names}
        title, unit = f"validation loss by {part}", _unit(evals)
    else:
        curves = {name: {row["step"]: row.get(name) for row in evals} for name in ("accuracy", *scores)}
        title, unit = "validation scores", ""
    for index, (name, values) in enumerate(curves.items()):
        held = {step: value for step, value in values.items() if value is not None}
        if held:
            _mark(axes, list(held), list(held.values()), COLOURS[index % len(COLOURS)], name)
    style_axes(axes, title, unit)
    shown = axes.get_legend_handles_labels()[1]
    if len(shown) == 1:
        axes.set_title(f"validation {shown[0]}", loc="left", fontsize=11, color=INK, fontweight="bold")


def _unit(evals: Rows) -> str:
    """The unit of a run's loss: a task's may be of a class, a span or a number."""
    return "nats a token" if all(parts(row)[0] == "denoiser" for row in evals) else ""


def _window(steps: int) -> int:
    """Steps that a curve of a run is smoothed over: short runs are drawn as they are."""
    return max(1, steps // 30)


def _named(window: int) -> str:
    return f" (mean over {window} steps)" if window > 1 else ""


class LivePlot:
    """Redraws a file in a background thread, at a cost of at most 2% of a core."""

    def __init__(self, draw: Callable[[], None]) -> None:
        self._draw = draw
        self._thread: threading.Thread | None = None
        self._next = time.perf_counter() + LEAST_SECONDS

    def poke(self) -> None:
        """Starts a drawing if the last one is long enough ago."""
        if time.perf_counter() < self._next or (self._thread is not None and self._thread.is_alive()):
            return
        self._next = math.inf
        self._thread = threading.Thread(target=self._run, name="fat5-plot", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Draws a last time, and returns when it is done."""
        if self._thread is not None:
            self._thread.join()
        self._run()

    def _run(self) -> None:
        began = time.perf_counter()
        with contextlib.suppress(OSError, FAT5Error):  # a full disk must not end a run for the sake of its picture
            self._draw()
        took = time.perf_counter() - began
        self._next = time.perf_counter() + max(LEAST_SECONDS, COST * took)


def new_figure(width: float, height: float) -> Any:
    """An empty figure in the house style; width and height in inches."""
    # Without pyplot: no global state, no display, safe in a thread.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Any, title: str, label: str) -> None:
    """The house style of one panel: its title, the label of y, few lines, a legend where there are several curves."""
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    axes.set_ylabel(label, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8)


def _curve(axes: Any, x: Sequence[float], y: Sequence[float], window: int, colour: str, label: str = "") -> None:
    """A smoothed line over the values themselves, which are faint."""
    if window > 1:
        axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(x, smooth(y, window), color=colour, linewidth=1.6, label=label or None)


def _mark(axes: Any, x: Sequence[float], y: Sequence[float], colour: str, label: str) -> None:
    axes.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=3, label=label)


def save_figure(figure: Any, target: Path, title: str) -> None:
    """Writes a PNG, which replaces `target` at once when complete."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    with whole_file(target) as file:
        figure.savefig(file, format="png", dpi=110)


def _split(rows: Rows) -> tuple[Rows, Rows]:
    return [row for row in rows if row["kind"] == "train"], [row for row in rows if row["kind"] == "eval"]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _distinct(runs: Sequence[Path]) -> list[str]:
    names = [run.resolve().name if run.is_dir() else run.stem for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    if len(set(names)) < len(names):
        raise DataError("the same run is given twice", hint="Name each run once")
    return names
