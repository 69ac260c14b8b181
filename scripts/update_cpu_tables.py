"""Writes the tables of docs/generate.md and docs/compatibility.md from benchmarks/results/*.csv.

    python scripts/update_cpu_tables.py

The part between `<!-- NAME:begin … -->` and `<!-- NAME:end -->` is replaced; nothing there is typed by hand.
"""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ["docs/generate.md", "docs/compatibility.md"]
FAMILIES = ["v1.0", "v1.1", "mT5", "umT5", "ByT5"]
ENCODERS = ["T5 encoder", "umT5 encoder"]
# Name of the part: result file, heading of the first column, columns as (heading, provider, metric).
TABLES = {
    "decoding": (
        "decoding_cpu",
        "case",
        [
            ("stock `generate`", "stock generate", "generation"),
            ("our loop", "fat5 loop", "generation"),
            ("tokens a second", "fat5 loop", "speed"),
            ("**times faster**", "stock / fat5", "speed-up"),
            ("rows with the same tokens", "stock = fat5", "rows with the same tokens"),
        ],
    ),
    "parity": ("parity", "check", [(family, family, "largest difference") for family in [*FAMILIES, *ENCODERS]]),
    "generation": ("generation", "mode", [(family, family, "equal tokens") for family in FAMILIES]),
    "accelerate": (
        "accelerate_cpu",
        "case",
        [
            ("stock sdpa", "stock sdpa", "time"),
            ("accelerated", "accelerated", "time"),
            ("**times faster**", "stock / accelerated", "speed-up"),
            ("with `fused_loss`", "stock / accelerated, fused loss", "speed-up"),
            ('`attn_implementation="fat5"` alone', "stock / attention alone", "speed-up"),
        ],
    ),
    "accelerate-memory": (
        "accelerate_cpu",
        "case",
        [
            ("stock sdpa", "stock sdpa", "peak memory"),
            ("accelerated", "accelerated", "peak memory"),
            ("**times less**", "stock / accelerated", "memory"),
            ('`attn_implementation="fat5"` alone', "stock / attention alone", "memory"),
        ],
    ),
}


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {page}")


def render(page: str) -> str:
    """The page with its generated part made anew from the file."""
    for name, (file, heading, columns) in TABLES.items():
        pattern = rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)"
        if re.search(pattern, page, flags=re.DOTALL):
            content = table(file, heading, columns)
            page = re.sub(pattern, rf"\g<1>{content}\n\g<2>", page, flags=re.DOTALL)
    return page


def table(file: str, heading: str, columns: list[tuple[str, str, str]]) -> str:
    """A line a case that has any of the columns, medians with p20 and p80 of the ratios; says so where nothing is
    measured yet.
    """
    path = RESULTS / f"{file}.csv"
    if not path.exists():
        return f"Not measured yet: `python benchmarks/{file}.py`."
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    found = {(row["case"], row["provider"], row["metric"]): row for row in rows}
    lines = [f"| {heading} | {' | '.join(name for name, _, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [found.get((case, provider, metric)) for _, provider, metric in columns]
        if any(cells):
            lines.append(f"| {case} | {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, "", f"{rows[0]['machine']}; {rows[0]['versions']}; {rows[0]['date']}."])


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    p20, p50, p80 = (float(row[key]) for key in ("p20", "p50", "p80"))
    if row["unit"] == "share":
        return f"{p50:.0%}" if p50 in (0.0, 1.0) else f"{p50:.2%}"
    if row["unit"] == "relative":
        return "0" if p50 == 0 else f"{p50:.1e}"
    if row["unit"] == "bytes":
        return f"{p50 / 1e6:,.0f} MB"
    figure = f"{p50:,.0f}" if p50 >= 1000 else f"{p50:.3g}"
    if row["unit"] == "s":
        return f"{figure} s"
    return f"**{figure}** ({p20:.3g} to {p80:.3g})" if row["unit"] == "ratio" else figure


if __name__ == "__main__":
    main()
