"""results.json and its drawings: what a fine-tuned model scores, by metric, by class, and over several seeds.

results_of       its content           aggregate       mean and interval over seeds
results_table    its content as a table for a terminal
draw_confusion   confusion.png         draw_classes    classes.png
"""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fat5.train.log.plots import COLOURS, FAINT, INK, PAPER, new_figure, save_figure, style_axes

COUNTED_CLASSES = 15
"""Up to as many classes, the counts stand in the cells of a confusion matrix."""

NAMED_CLASSES = 60
"""Up to as many, the classes are named beside it."""

DRAWN_CLASSES = 30
"""Bars at most; with more classes those with the lowest F1 are drawn."""

LONGEST_LABEL = 24

CONFIDENCE = 0.95

LISTED_CLASSES = 20
"""With more classes, the table leaves them to the file."""


def results_of(
    metrics: Mapping[str, float | Mapping[str, Any]], *, examples: int, split: str, model: str, task: str, **more: Any
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        metrics: of `measure`, `measure_with_intervals` or `aggregate`.
        split: validation, test, or a file.
        more: further keys of the file, such as by_class.

    Returns:
        task, model, split, examples, metrics (name → value, low, high), and the further keys. A number that is not
        finite is null, and so is a bound that was not measured.
    """
    scores = {
        name: dict(score) if isinstance(score, Mapping) else {"value": score, "low": None, "high": None}
        for name, score in metrics.items()
    }
    head = {"task": task, "model": model, "split": split, "examples": examples}
    content: dict[str, Any] = _finite({**head, "metrics": scores, **more})
    return content


def results_text(content: Mapping[str, Any]) -> str:
    """The content as the file has it."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def results_table(content: Mapping[str, Any]) -> str:
    """The content as a table: each metric with its interval, then each class; over seeds, the mean and its interval."""
    seeds, metrics, classes = content.get("seeds"), content["metrics"], content.get("by_class", {})
    cut = f", {content['examples_cut']:,} of them cut" if content.get("examples_cut") else ""
    over = f", {len(seeds)} seeds" if seeds else ""
    what = "mean" if seeds else "value"
    width = max(6, *(len(name) for name in metrics))
    lines = [f"{content['task']}, {content['examples']:,} examples of {content['split']}{cut}{over}", ""]
    lines.append(f"{'metric':{width}}  {what:>8}  95% interval")
    for name, score in metrics.items():
        interval = "–" if score["low"] is None else f"{_number(score['low'])} to {_number(score['high'])}"
        lines.append(f"{name:{width}}  {_number(score[what]):>8}  {interval}")
    if 0 < len(classes) <= LISTED_CLASSES:
        width = max(5, *(len(name) for name in classes))
        lines += ["", f"{'class':{width}}  precision    recall        f1   targets"]
        for name, score in classes.items():
            shares = "  ".join(f"{score[key]:8.4f}" for key in ("precision", "recall", "f1"))
            lines.append(f"{name:{width}}   {shares}  {score['support']:8,}")
    return "\n".join(lines)


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each metric over several runs that differ in their seed, from the contents of their results.json.

    Returns:
        Name → mean, low and high of a 95% t-interval of the mean, and the values. The bounds are null for one run; all
        three are null where a run has no value.

    Raises:
        ConfigurationError: scipy is not installed.
    """
    names = results[0]["metrics"] if results else ()
    return {name: _summarise([result["metrics"][name]["value"] for result in results]) for name in names}


def draw_confusion(labels: Sequence[str], matrix: Any, path: Path) -> None:
    """Draws a confusion matrix: shares of each row, with the counts where there are few classes.

    Args:
        matrix: counts (classes, classes), rows are targets and columns predictions.
    """
    from matplotlib.colors import LinearSegmentedColormap

    count = len(labels)
    rows = [[int(value) for value in row] for row in matrix]
    shares = [[value / max(1, sum(row)) for value in row] for row in rows]
    side = min(14.0, max(4.0, 2.2 + 0.45 * count))
    figure = new_figure(side + 0.8, side)
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("shares", [PAPER, COLOURS[0]])
    image = axes.imshow(shares, cmap=colours, vmin=0, vmax=1)
    style_axes(axes, "share of each class, by prediction", "target")
    axes.grid(visible=False)
    axes.set_xlabel("prediction", color=INK, fontsize=9)
    names = [_short(label) for label in labels]
    places = list(range(count)) if count <= NAMED_CLASSES else []
    axes.set_xticks(places, names if places else [], rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(places, names if places else [], parse_math=False)
    if count <= COUNTED_CLASSES:
        for row, (values, of_row) in enumerate(zip(rows, shares, strict=True)):
            for column, value in enumerate(values):
                ink = PAPER if of_row[column] > 0.5 else INK
                axes.text(column, row, f"{value:,}", ha="center", va="center", fontsize=8, color=ink)
    bar = figure.colorbar(image, ax=axes, fraction=0.046)
    bar.outline.set_edgecolor(FAINT)
    bar.ax.tick_params(colors=INK, labelsize=8)
    _save(figure, path)


def draw_classes(by_class: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draws the F1 of each class of `measure_by_class`, lowest last, with its number of targets."""
    ranked = sorted(by_class.items(), key=lambda item: -item[1]["f1"])[-DRAWN_CLASSES:]
    figure = new_figure(7.5, max(2.4, 1.2 + 0.3 * len(ranked)))
    axes = figure.add_subplot()
    places = list(range(len(ranked)))
    bars = axes.barh(places, [score["f1"] for _, score in ranked], color=COLOURS[0], height=0.65)
    names = [f"{_short(name)} ({score['support']:,.0f})" for name, score in ranked]
    axes.bar_label(bars, [f"{score['f1']:.3f}" for _, score in ranked], padding=3, fontsize=8, color=INK)
    only = f", the {len(ranked)} lowest of {len(by_class)} classes" if len(by_class) > len(ranked) else " by class"
    style_axes(axes, f"F1{only} (number of targets)", "")
    axes.grid(visible=False)
    axes.set_yticks(places, names, parse_math=False)
    axes.set_xlim(0, 1.08)
    axes.invert_yaxis()
    _save(figure, path)


def _summarise(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return {"mean": None, "low": None, "high": None, "values": values}
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return {"mean": mean, "low": None, "high": None, "values": values}
    from fat5.tasks.metrics.bootstrap import eval_library

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))
    quantile = float(eval_library("scipy.stats", "scipy").t.ppf((1 + CONFIDENCE) / 2, len(known) - 1))
    half = quantile * deviation / math.sqrt(len(known))
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": values}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _finite(value: Any) -> Any:
    """The same content, null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a label in a script that the font lacks
        save_figure(figure, path, "")
