"""Writes the README's figures from files: nothing there is typed by hand.

    python scripts/update_readme.py                  from benchmarks/results/
    python scripts/update_readme.py --demo demo      takes over a demo's summary and plot first

The part between `<!-- NAME:begin … -->` and `<!-- NAME:end -->` is replaced.
"""

import argparse
import csv
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
DEMO = RESULTS / "demo.json"
PLOT = ROOT / "docs" / "images" / "demo-loss.png"

# Benchmark file, metric, cases (all of them: None), what the table says, target.
FIGURES = [
    (
        "attention_cpu",
        "time ratio",
        None,
        "CPU attention with learned bias, time over SDPA with the bias detached",
        "≤ 1.15",
    ),
    (
        "attention_cpu",
        "speed-up",
        None,
        "CPU attention with learned bias, times faster than SDPA with a bias gradient",
        "≥ 1.5, 2.2",
    ),
    (
        "attention_cpu",
        "peak memory ratio",
        None,
        "CPU attention, peak memory of SDPA with a materialised bias over ours",
        "≥ 20",
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="folder of a finished demo")
    folder = parser.parse_args().demo
    if folder is not None:
        DEMO.write_text((folder / "summary.json").read_text(encoding="utf-8"), encoding="utf-8")
        PLOT.parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "loss.png", PLOT)
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {README.name}")


def render(readme: str) -> str:
    """The README with its generated parts made anew from the files."""
    return _replace(_replace(readme, "demo", demo_part()), "benchmarks", benchmark_part())


def demo_part() -> str:
    """The demo's figures, plot and samples."""
    summary = json.loads(DEMO.read_text(encoding="utf-8"))
    denoisers = "\n".join(f"| {name} | {loss:.2f} |" for name, loss in summary["val_loss_by_denoiser"].items())
    samples = "\n".join(f"| {_cell(sample['prompt'])} | {_cell(sample['text'])} |" for sample in summary["samples"])
    size, tokens, seconds = summary["parameters"], summary["train_tokens"], summary["seconds"]
    first, last, unigram = summary["val_loss_first"], summary["val_loss_last"], summary["unigram_entropy"]
    fills = f"Encoder fill {summary['encoder_fill']:.1%}, decoder fill {summary['decoder_fill']:.1%}"
    return f"""{size:,} parameters, {tokens:,} tokens in {seconds:.0f} seconds on two CPU cores
({summary["tokens_per_second"]:,.0f} tokens a second). Validation loss {first:.2f} → **{last:.2f}** nats a token; the
unigram entropy of the same targets is {unigram:.2f}. {fills}, tokens dropped: {summary["tokens_dropped"]}.

![Loss, rate and throughput of the demo](docs/images/demo-loss.png)

| denoiser | validation loss |
|---|---|
{denoisers}

What this little model then writes (real output of the run above; it has seen a single book for minutes):

| prompt | completed |
|---|---|
{samples}"""


def benchmark_part() -> str:
    """One table of the ratios, with where they were measured."""
    lines = ["| what | case | p20 | **median** | p80 | target |", "|---|---|---|---|---|---|"]
    machines = set()
    for name, metric, cases, says, target in FIGURES:
        for row in read(name):
            if row["metric"] == metric and (cases is None or row["case"] in cases):
                lines.append(f"| {says} | {row['case']} | {row['p20']} | **{row['p50']}** | {row['p80']} | {target} |")
                machines.add(f"{row['machine']}; {row['versions']}")
    where = "; ".join(sorted(machines))
    return "\n".join(
        [
            *lines,
            "",
            f"Measured on: {where}. Each line: `make bench` or the command in its CSV under `benchmarks/results/`.",
        ]
    )


def read(name: str) -> list[dict[str, str]]:
    """Rows of one result file."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _replace(text: str, name: str, content: str) -> str:
    pattern = rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)"
    found, count = re.subn(pattern, lambda match: f"{match.group(1)}{content}\n{match.group(2)}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"README.md: expected one part {name!r}, found {count}")
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
