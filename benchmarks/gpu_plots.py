"""Draws what gpu_attention.py and gpu_fused.py measured: a PNG beside each CSV.

    python benchmarks/gpu_plots.py benchmarks/results/h200-attention.csv [--output_dir .]

Both call `draw` themselves when they end.
"""

import argparse
import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Figures = dict[tuple[str, str, str], float]
"""Median of (case, provider, metric)."""
LENGTHS = re.compile(r"D(\d+) L(\d+)( causal)?$")
STAGES = ("forward", "backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output_dir", type=Path, help="the folder of each file when left out")
    options = parser.parse_args()
    for path in options.results:
        for picture in draw(path, options.output_dir or path.parent):
            print(f"wrote {picture}")


def draw(results: Path, folder: Path) -> list[Path]:
    """Writes folder/NAME.png, and folder/NAME-other.png for cases that are no series over lengths.

    Args:
        results: a CSV of gpu_measure.Results.
        folder: where the pictures go; it exists.

    Returns:
        The pictures; none where the file holds nothing to draw.
    """
    found = read(results)
    ceiling = found.get(("ceiling", "torch", "bf16 matrix product"))
    made = []
    if any(LENGTHS.match(case) and metric == "forward" for case, _, metric in found):
        made.append(_save(_over_lengths(found, ceiling), folder / f"{results.stem}.png"))
    rates = _matrix(found, [(stage, f"{stage}, TFLOP/s") for stage in STAGES if _has(found, "peak memory", "GB")])
    shares = _matrix(found, [("share of roofline", "share of what the card's copy or matrix product allows")])
    for name, figure in (("other", rates), ("roofline", shares)):
        if figure is not None:
            made.append(_save(figure, folder / f"{results.stem}-{name}.png"))
    return made


def read(results: Path) -> Figures:
    """The medians of a file; of a question asked twice, the last."""
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Times in seconds (of candidates, of single kernels) are no rates.
    return {(row["case"], row["provider"], row["metric"]): float(row["p50"]) for row in rows if row["unit"] != "s"}


def _over_lengths(found: Figures, ceiling: float | None) -> Any:
    """TFLOP/s over the length: a row a head dimension and mask, forward and backward side by side."""
    series: dict[tuple[int, str], dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for (case, provider, metric), value in found.items():
        match = LENGTHS.match(case)
        if match and metric in STAGES:
            panel = series.setdefault((int(match[1]), match[3] or ""), {})
            panel.setdefault((metric, provider), []).append((int(match[2]), value))
    figure, axes = _subplots(len(series), 2)
    colours = _colours(provider for panel in series.values() for _, provider in panel)
    for row, ((width, causal), panel) in enumerate(sorted(series.items())):
        for column, stage in enumerate(STAGES):
            ax = axes[row][column]
            for (metric, provider), points in panel.items():
                if metric == stage:
                    x, y = zip(*sorted(points))
                    ax.plot(x, y, marker="o", markersize=3, linewidth=1.6, label=provider, color=colours[provider])
            if ceiling:
                ax.axhline(ceiling, color="0.6", linestyle="--", linewidth=1, label="matrix product of this card")
            ax.set_xscale("log", base=2)
            ax.set_xticks(lengths := sorted({x for points in panel.values() for x, _ in points}))
            ax.set_xticklabels([f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
            ax.set_ylim(bottom=0)
            ax.set_title(f"{stage}, head dimension {width}{causal}", loc="left", fontsize=10)
            ax.set_ylabel("TFLOP/s")
            if row == column == 0:
                ax.legend(frameon=False, fontsize=7)
    return figure


def _matrix(found: Figures, metrics: list[tuple[str, str]]) -> Any | None:
    """Bars a case and provider, of cases that are no series over lengths; None where there are none."""
    metrics = [
        (metric, label)
        for metric, label in metrics
        if any(m == metric and not LENGTHS.match(case) for case, _, m in found)
    ]
    if not metrics:
        return None
    cases = list(dict.fromkeys(c for c, _, m in found if not LENGTHS.match(c) and m in dict(metrics)))
    providers = list(dict.fromkeys(p for c, p, m in found if c in cases and m in dict(metrics)))
    figure, axes = _subplots(1, len(metrics), height=1.2 + 0.16 * len(cases) * (len(providers) + 1))
    colours, bar = _colours(providers), 1 / (len(providers) + 1)
    for ax, (metric, label) in zip(axes[0], metrics):
        for n, provider in enumerate(providers):
            values = [found.get((case, provider, metric), 0.0) for case in cases]
            places = [place + (n - len(providers) / 2) * bar for place in range(len(cases))]
            ax.barh(places, values, height=bar, label=provider, color=colours[provider])
        ax.set_yticks(range(len(cases)), cases, fontsize=8)
        ax.invert_yaxis()
        ax.set_xlabel(label)
    axes[0][-1].legend(frameon=False, fontsize=7)
    return figure


def _has(found: Figures, metric: str, unit: str) -> bool:
    return any(m == metric for _, _, m in found)


def _colours(providers: Iterable[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    names = sorted(set(providers))
    return {name: colormaps["tab20"](n % 20) for n, name in enumerate(names)}


def _subplots(rows: int, columns: int, height: float = 0.0) -> tuple[Any, Any]:
    # Without pyplot: no display, no state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns, height or 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, target: Path) -> Path:
    figure.savefig(target, dpi=110, metadata={"Software": None})
    return target


if __name__ == "__main__":
    main()
