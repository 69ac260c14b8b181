"""The figure of an audit: how long documents and the two sides of their examples are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def draw(
    names: Sequence[str],
    encoder: Sequence[Sequence[int]],
    decoder: Sequence[Sequence[int]],
    raw: np.ndarray,
    path: Path,
) -> None:
    """Draws length histograms to a PNG: pieces; encoder and decoder sides by denoiser, stacked.

    Args:
        names: of the denoisers.
        encoder, decoder: lengths of each denoiser's examples.
        raw: (N,) raw tokens of each piece.
        path: file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    pieces, inputs, targets = figure.subplots(1, 3)
    pieces.hist(raw, bins=60, color="0.4")
    pieces.set_title(f"pieces: {raw.size:,}, mean {raw.mean():.0f} tokens")
    for axes, sides, title in ((inputs, encoder, "encoder side"), (targets, decoder, "decoder side")):
        lengths = np.concatenate([np.asarray(side, np.int64) for side in sides])
        axes.hist(sides, bins=60, stacked=True, label=names)
        axes.set_title(f"{title}, mean {lengths.mean():.0f} tokens")
    targets.legend(fontsize="small")
    for axes in (pieces, inputs, targets):
        axes.set_xlabel("tokens")
        axes.set_ylabel("examples")
    figure.savefig(path, dpi=110)
