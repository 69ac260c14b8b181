"""Draws the pictures of the pages, docs/images/*.svg, from what the code computes: python scripts/draw.py.

A picture brings its own ground and two sets of colours, for readers in the light and in the dark.
"""

import random
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

import numpy as np
import torch

from fat5.data import MixtureOfDenoisers, TokenizerInfo, pack
from fat5.ops import RelativeBias

FOLDER = Path(__file__).resolve().parents[1] / "docs/images"
WIDTH = 760
STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:#24292f}
.t{font-weight:600;font-size:15px}.s{font-size:12px;fill:#57606a}.w{fill:#fff;font-size:11px}
.g{fill:#fff;stroke:#d0d7de}.n{fill:#eef1f4}.l{stroke:#8c959f;fill:none}.p{stroke:#3b6fd1;stroke-width:2;fill:none}
.a{fill:#3b6fd1}.b{fill:#e08b2c}.c{fill:#2f9e7a}.d{fill:#9a5bc7}.e{fill:#c8506b}.f{fill:#b7cbf0}.h{fill:#f3d3a8}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9aa4af}.w{fill:#0d1117}
.g{fill:#161b22;stroke:#30363d}.n{fill:#262c36}.l{stroke:#6e7681}.p{stroke:#7aa2f7}
.a{fill:#7aa2f7}.b{fill:#e9a85b}.c{fill:#5cc7a2}.d{fill:#bd93e6}.e{fill:#e07a93}.f{fill:#34466f}.h{fill:#6b4d22}}
"""
DOCUMENTS = "abcde"
"""Colours of documents, one after another."""


class Drawing:
    """A picture that grows by its parts."""

    def __init__(self, height: int, what: str) -> None:
        self.height, self.what, self.parts = height, what, [""]

    def box(self, x: float, y: float, width: float, height: float, kind: str, said: str = "") -> None:
        """A rectangle of a colour, with a word on it."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="1.5"/>')
        if said:
            self.text(x + width / 2, y + height / 2 + 4, said, "w", "middle")

    def text(self, x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> None:
        """A line of text that starts, ends or has its middle at x."""
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(said)}</text>')

    def path(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        self.parts.append(f'<path class="{kind}" d="M{" L".join(f"{x:g} {y:g}" for x, y in points)}"/>')

    def svg(self) -> str:
        """The file."""
        ground = f'<rect class="g" x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="8"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" role="img">'
        body = "\n".join(self.parts)
        return f"{head}\n<title>{escape(self.what)}</title>\n<style>{STYLE}</style>\n{ground}{body}\n</svg>\n"


def draw_tiles() -> Drawing:
    """Scores of three packed documents in tiles, near and far, and the vector that the near ones read."""
    drawing = Drawing(372, "Tiles of the scores of three packed documents: near, far, and those that are not computed")
    tile, reach, lengths = 64, 91, (512, 320, 192)
    side, left, top = 18, 28, 62
    drawing.text(left, 32, "Scores of three packed documents", "t")
    drawing.text(left, 51, "queries down, keys across; tiles of 64 × 64", "s")
    starts = np.cumsum([0, *lengths]) // tile
    counts = {"near": 0, "far": 0, "none": 0}
    for row in range(starts[-1]):
        for column in range(starts[-1]):
            same = np.searchsorted(starts, row, "right") == np.searchsorted(starts, column, "right")
            closest = max(0, (abs(row - column) - 1) * tile + 1)
            kind = "none" if not same else "near" if closest < reach else "far"
            counts[kind] += 1
            colour = {"none": "n", "near": "a", "far": "f"}[kind]
            drawing.box(left + column * side, top + row * side, side - 1.5, side - 1.5, colour)
    x = 366
    for line, (colour, name, said) in enumerate(
        [
            ("a", "near", "reads the bias by distance from its vector"),
            ("f", "far", "all distances beyond R: one number"),
            ("n", "none", "between documents: not computed"),
        ]
    ):
        drawing.box(x, 66 + 24 * line, 14, 14, colour)
        drawing.text(x + 22, 78 + 24 * line, f"{counts[name]} tiles: {said}", "s")
    _draw_vector(drawing, x, 176, reach)
    return drawing


def _draw_vector(drawing: Drawing, left: int, top: int, reach: int) -> None:
    table = torch.tensor([1 - 0.22 * (bucket % 16) ** 0.75 + 0.5 * (bucket // 16) for bucket in range(32)])[:, None]
    values = RelativeBias.from_table(table, bidirectional=True, max_distance=128).vector[0].tolist()
    shown, wide, high = 130, 364, 112
    distances = range(-shown, shown + 1)
    heights = [values[min(max(distance, -reach), reach) + reach] for distance in distances]
    low, span = min(heights), max(heights) - min(heights)
    places = [left + wide * (distance + shown) / (2 * shown) for distance in distances]
    drawing.text(left, top - 6, "Bias of one head by distance, key − query", "t")
    points: list[tuple[float, float]] = []
    for x, height in zip(places, heights):
        y = top + 14 + high * (1 - (height - low) / span)
        points += [(x, points[-1][1]), (x, y)] if points else [(x, y)]
    bottom = top + high + 24
    for distance, said in ((-reach, "−R = −91"), (0, "0"), (reach, "R = 91")):
        x = left + wide * (distance + shown) / (2 * shown)
        drawing.path([(x, top + 8), (x, bottom)], "l")
        drawing.text(x, bottom + 16, said, "s", "middle")
    drawing.path([(left, bottom), (left + wide, bottom)], "l")
    drawing.path(points, "p")
    drawing.text(left, bottom + 38, "The steps are T5's 32 buckets; nothing changes beyond R.", "s")


def draw_packing() -> Drawing:
    """The same examples padded and packed."""
    drawing = Drawing(392, "The same examples in a padded batch and in packs")
    chooser = random.Random(3)
    encoder = [chooser.randrange(40, 330) for _ in range(24)]
    decoder = [round(length * chooser.uniform(0.5, 0.9)) for length in encoder]
    rows, left, scale = 6, 28, 0.66
    drawing.text(left, 32, "Padded", "t")
    drawing.text(left + 76, 32, "a batch of six: every row as long as the longest", "s")
    for lengths, x, name in ((encoder, left, "encoder"), (decoder, 400, "decoder")):
        longest = max(lengths[:rows])
        for row, length in enumerate(lengths[:rows]):
            drawing.box(x, 64 + 20 * row, longest * scale, 15, "n")
            drawing.box(x, 64 + 20 * row, length * scale, 15, DOCUMENTS[row % 5], str(length))
        share = sum(lengths[:rows]) / rows / longest
        drawing.text(x, 56, f"{name}: {share:.0%} of {rows} × {longest} are tokens", "s")
    budget = (1024, 768)
    plan = pack(encoder, decoder, encoder_tokens=budget[0], decoder_tokens=budget[1])[:3]
    drawing.text(left, 222, "Packed", "t")
    drawing.text(left + 76, 222, "fixed budgets for both sides; each document attends only to itself", "s")
    for side, (lengths, x, name) in enumerate(((encoder, left, "encoder"), (decoder, 400, "decoder"))):
        wide = 332 / budget[side]
        for row, members in enumerate(plan):
            start, y = float(x), 256 + 26 * row
            drawing.box(x, y, 332, 18, "n")
            for number, member in enumerate(members):
                drawing.box(start, y, lengths[member] * wide - 1, 18, DOCUMENTS[number % 5], str(lengths[member]))
                start += lengths[member] * wide
        share = sum(lengths[member] for members in plan for member in members) / len(plan) / budget[side]
        drawing.text(x, 248, f"{name}: {share:.1%} of {len(plan)} × {budget[side]:,}", "s")
    drawing.text(
        left, 356, "No row of a product is padding, no token is dropped, and every pack has the same shape:", "s"
    )
    drawing.text(
        left,
        374,
        "a compiled model is compiled once. With a window of 1,024 examples packs fill further than here.",
        "s",
    )
    return drawing


def draw_denoisers() -> Drawing:
    """What each denoiser of the default mixture hides of one document."""
    drawing = Drawing(330, "One document under the seven denoisers of the mixture fat5: what is kept, what is hidden")
    info = TokenizerInfo(4096, 0, 1, 2, tuple(range(10, 266)), {"[R]": 3, "[S]": 4, "[X]": 5}, "")
    length, first, left, wide = 96, 1000, 208, 4.25
    drawing.text(28, 32, f"One document of {length} tokens under the mixture fat5", "t")
    for x, colour, said in (
        (28, "f", "kept: the encoder reads it"),
        (226, "b", "hidden: the decoder writes it, span by span"),
    ):
        drawing.box(x, 44, 14, 14, colour)
        drawing.text(x + 21, 56, said, "s")
    drawing.text(WIDTH - 28, 78, "encoder + decoder", "s", "end")
    for row, denoiser in enumerate(MixtureOfDenoisers.named("fat5").denoisers):
        y = 88 + 32 * row
        inputs, targets = denoiser(range(first, first + length), info, seed=0, epoch=0, piece=row)
        kept = {token - first for token in inputs.tolist() if token >= first}
        about = f"mean span {denoiser.mu:g}, rate {denoiser.r:g}" if denoiser.r else f"keeps a {denoiser.mu:g}th"
        drawing.text(28, y + 15, denoiser.prefix or "")
        drawing.text(54, y + 15, about.replace("4th", "quarter"), "s")
        for place in range(length):
            drawing.box(left + place * wide, y, wide - 0.7, 20, "f" if place in kept else "b")
        drawing.text(WIDTH - 28, y + 15, f"{len(inputs)} + {len(targets)}", "s", "end")
    return drawing


def draw_order() -> Drawing:
    """From two sources to the packs of a step, and to the processes that share them."""
    drawing = Drawing(396, "Order: two sources, the stream, packs, steps, and the processes that share a step")
    chooser, left, side = random.Random(1), 150, 23
    passes = {name: [chooser.sample(range(count), count) for _ in range(2)] for name, count in (("a", 9), ("b", 5))}
    shown = 24
    drawing.text(28, 32, "Order is computed from the seed and a position, never stored", "t")
    streams = {}
    for row, (name, said) in enumerate((("a", "source A, weight 3"), ("b", "source B, weight 1"))):
        y = 56 + 36 * row
        drawing.text(28, y + 15, said, "s")
        pieces = [(number, turn) for turn in range(2) for number in passes[name][turn]][: 18 if name == "a" else 10]
        for place, (number, turn) in enumerate(pieces):
            drawing.box(left + place * side + 9 * turn, y, side - 2, 20, name, str(number))
        streams[name] = iter(pieces)
    drawing.text(left, 144, "each pass over a source is a permutation of its own, keyed by seed, source and pass", "s")
    stream = ["b" if place % 4 == 2 else "a" for place in range(shown)]
    drawing.text(28, 177, "stream", "s")
    for place, name in enumerate(stream):
        drawing.box(left + place * side, 162, side - 2, 20, name, str(next(streams[name])[0]))
    drawing.text(
        left,
        200,
        "sources alternate in a fixed pattern, by shares of tokens; noise comes from (seed, pass, piece)",
        "s",
    )
    drawing.text(28, 233, "packs", "s")
    packs = 8
    for number in range(packs):
        step = number // 4
        drawing.box(left + number * 3 * side, 218, 3 * side - 3, 20, "c" if step == 0 else "d", f"pack {number}")
    for step in range(2):
        x = left + step * 12 * side
        drawing.path([(x, 244), (x, 249), (x + 12 * side - 3, 249), (x + 12 * side - 3, 244)], "l")
        drawing.text(x + 6 * side, 264, f"step {step}", "s", "middle")
    for row, processes in enumerate((1, 2, 4)):
        y, each = 282 + 28 * row, packs // 2 // processes
        drawing.text(28, y + 15, f"{processes} process{'es' * (processes > 1)}", "s")
        for part in range(2 * processes):
            wide = each * 3 * side
            drawing.box(left + part * wide, y, wide - 3, 20, "f" if part % 2 else "h")
            drawing.text(left + part * wide + wide / 2, y + 14, f"process {part % processes}", "s", "middle")
    drawing.text(
        left, 382, "The same packs in the same step under any number of processes, workers and micro-batches.", "s"
    )
    return drawing


PICTURES: dict[str, Callable[[], Drawing]] = {
    "attention-tiles.svg": draw_tiles,
    "packing.svg": draw_packing,
    "denoisers.svg": draw_denoisers,
    "order.svg": draw_order,
}


def main() -> None:
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw().svg(), encoding="utf-8")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
