"""The pictures of docs/results.md, in the style of `fat5 plot`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fat5.train.log.plots import (
    COLOURS,
    INK,
    draw_evaluations,
    new_figure,
    save_figure,
    smooth,
    style_axes,
)
from results_files import Run, interval

SMOOTHED = 12
"""Kept train rows that a curve is smoothed over: a thirtieth of a run."""


def draw_pretraining(runs: Sequence[Run], target: Path) -> None:
    """Training and validation loss over tokens, and the validation loss of the first run by denoiser."""
    figure = new_figure(12.5, 4.8)
    loss, divided = figure.subplots(1, 2)
    for run, colour in zip(runs, COLOURS):
        tokens = [row["tokens"] / 1e6 for row in run.train]
        train = [float("nan") if row["loss"] is None else row["loss"] for row in run.train]
        loss.plot(tokens, train, color=colour, alpha=0.25, linewidth=0.8)
        loss.plot(
            tokens, smooth(train, SMOOTHED), color=colour, linewidth=1.2, label=f"{run.facts['preset']}, training"
        )
        made = [0, *(row["step"] for row in run.train)]
        at = np.interp([row["step"] for row in run.evals], made, [0.0, *tokens])
        held_out = [row["loss"] for row in run.evals]
        name = f"{run.facts['preset']}, validation"
        loss.plot(at, held_out, color=colour, linewidth=1.6, marker="o", markersize=3, linestyle="--", label=name)
    style_axes(loss, "loss", "nats a token")
    loss.set_xlabel("million tokens", color=INK, fontsize=9)
    draw_evaluations(divided, runs[0].evals)
    divided.set_title(f"{runs[0].facts['preset']}: validation loss by denoiser", loc="left", fontsize=11, color=INK)
    divided.set_xlabel("step", color=INK, fontsize=9)
    save_figure(figure, target, "")


def draw_clock(runs: dict[str, Run], names: dict[str, str], target: Path) -> None:
    """Validation loss of every side over seconds of training, and over tokens."""
    figure = new_figure(12.5, 4.8)
    seconds, tokens = figure.subplots(1, 2, sharey=True)
    for (key, label), colour in zip(names.items(), COLOURS):
        run = runs.get(key)
        if run is None or not run.train:
            continue
        at, losses = run.curve()
        style = {"color": colour, "linewidth": 1.6, "marker": "o", "markersize": 3, "label": label}
        seconds.plot(at, losses, **style)
        made = [0, *(row["step"] for row in run.train)]
        seen = np.interp([row["step"] for row in run.evals], made, [0.0, *(row["tokens"] / 1e6 for row in run.train)])
        tokens.plot(seen, losses, **style)
    style_axes(seconds, "validation loss against the clock", "nats a token")
    style_axes(tokens, "against tokens", "")
    seconds.set_xlabel("seconds of training", color=INK, fontsize=9)
    tokens.set_xlabel("million useful tokens", color=INK, fontsize=9)
    save_figure(figure, target, "")


def draw_variants(values: dict[str, Sequence[float]], title: str, target: Path) -> None:
    """One line a variant: each seed, the mean, and its interval; the first is what the others are compared with."""
    figure = new_figure(7.5, 1.1 + 0.4 * len(values))
    axes = figure.add_subplot()
    for place, (_, seeds) in enumerate(values.items()):
        mean, half = interval(seeds)
        colour = COLOURS[1] if place == 0 else COLOURS[0]
        axes.plot(seeds, [place] * len(seeds), "o", color=colour, alpha=0.35, markersize=5)
        axes.errorbar(
            mean, place, xerr=0 if np.isnan(half) else half, color=colour, marker="|", markersize=12, capsize=3
        )
    first = interval(next(iter(values.values())))[0]
    axes.axvline(first, color=INK, linewidth=0.8, linestyle=":")
    style_axes(axes, title, "")
    axes.grid(visible=False)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel("validation loss, nats a token", color=INK, fontsize=9)
    save_figure(figure, target, "")
