"""Writes the tables of docs/generate.md and docs/accelerate.md from benchmarks/results/*_cpu.csv.

    python scripts/update_cpu_tables.py

The part between `<!-- NAME:begin … -->` and `<!-- NAME:end -->` is replaced; nothing there is typed by hand.
"""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ["docs/generate.md"]
# Name of the part: result file, columns as (heading, provider, metric).
TABLES = {
    "decoding": (
        "decoding_cpu",
        [
            ("stock `generate`, s", "stock generate", "generation"),
            ("our loop, s", "fat5 loop", "generation"),
            ("tokens a second", "fat5 loop", "speed"),
            ("**times faster**", "stock / fat5", "speed-up"),
            ("rows with the same tokens", "stock = fat5", "rows with the same tokens"),
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
    for name, (file, columns) in TABLES.items():
        pattern = rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)"
        if re.search(pattern, page, flags=re.DOTALL):
            content = table(file, columns)
            page = re.sub(pattern, rf"\g<1>{content}\n\g<2>", page, flags=re.DOTALL)
    return page


def table(file: str, columns: list[tuple[str, str, str]]) -> str:
    """A line a case, medians with p20 and p80 of the ratios."""
    with (RESULTS / f"{file}.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    found = {(row["case"], row["provider"], row["metric"]): row for row in rows}
    lines = [f"| case | {' | '.join(heading for heading, _, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [_cell(found.get((case, provider, metric))) for _, provider, metric in columns]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{rows[0]['machine']}; {rows[0]['versions']}; {rows[0]['date']}."])


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    p20, p50, p80 = (float(row[key]) for key in ("p20", "p50", "p80"))
    if row["unit"] == "share":
        return f"{p50:.0%}"
    if row["unit"] == "bytes":
        return f"{p50 / 1e6:,.0f} MB"
    figure = f"{p50:,.0f}" if p50 >= 1000 else f"{p50:.3g}"
    return f"**{figure}** ({p20:.3g} to {p80:.3g})" if row["unit"] == "ratio" else figure


if __name__ == "__main__":
    main()
