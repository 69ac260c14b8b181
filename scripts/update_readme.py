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

# Benchmark file, metric, words that the case or provider must hold, what the table says, target.
FIGURES = [
    ("ul2", "speed", "", "UL2 pipeline on one core, times faster than a per-example NumPy collator", "≥ 10"),
    ("ul2", "useful tokens", "fat5", "UL2 pipeline on one core, tokens a second", "≥ 2M, 6M"),
    ("ul2", "encoder fill", "fat5", "fill of the encoder budget", "≥ 0.97"),
    ("ul2", "decoder fill", "fat5", "fill of the decoder budget", "≥ 0.97"),
    ("prepare", "over encode_batch", "", "`fat5 prepare` over bare `tokenizers`", "≥ 0.8"),
    ("attention_cpu", "time ratio", "", "CPU attention with learned bias, time over SDPA with it detached", "≤ 1.15"),
    ("attention_cpu", "speed-up", "", "CPU attention, times faster than SDPA with a bias gradient", "≥ 1.5, 2.2"),
    ("attention_cpu", "peak memory ratio", "", "CPU attention, peak memory of SDPA with a bias over ours", "≥ 20"),
    (
        "training_cpu",
        "speed-up",
        "",
        "CPU training, useful tokens a second over stock T5 (sdpa, padded)",
        "≥ 2.5, compiled 1.8",
    ),
    ("startup", "time", "fat5", "start of the command, and what the package adds to PyTorch's import", "< 0.3, 0.2 s"),
]
GPU_CASES = ["D64 L1024", "D64 L2048", "D64 L4096", "D64 L1024 causal", "D128 L1024", "D128 L4096", "packed D64"]
GPU_PROVIDERS = ["fat5 bias", "fat5 no bias", "sdpa flash", "flash varlen", "sdpa learned bias"]


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
    for name, part in (("demo", demo_part()), ("benchmarks", benchmark_part()), ("h200", h200_part())):
        readme = _replace(readme, name, part)
    return readme


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
    for name, metric, word, says, target in FIGURES:
        for row in read(name):
            if row["metric"].startswith(metric) and word in row["case"] + row["provider"]:
                p20, p50, p80 = (_figure(row[key]) for key in ("p20", "p50", "p80"))
                what = f"{row['case']}: {row['provider']}, {row['metric']}"
                lines.append(f"| {says} | {what} | {p20} | **{p50}** | {p80} | {target} |")
                machines.add(f"{row['machine']}; {row['versions']}")
    where = "; ".join(sorted(machines))
    return "\n".join(
        [
            *lines,
            "",
            f"Measured on: {where}. Each line: `make bench` or the command in its CSV under `benchmarks/results/`.",
        ]
    )


def h200_part() -> str:
    """Attention on an H200: forward and backward TFLOP/s, and memory."""
    rows = {(row["case"], row["provider"], row["metric"]): row["p50"] for row in read("h200-attention")}
    lines = [f"| case | {' | '.join(GPU_PROVIDERS)} |", "|---" * (len(GPU_PROVIDERS) + 1) + "|"]
    for case in GPU_CASES:
        cells = []
        for provider in GPU_PROVIDERS:
            figures = [rows.get((case, provider, metric)) for metric in ("forward", "backward", "peak memory")]
            whole = None not in figures
            cells.append("{:.0f} / {:.0f}, {:.1f} GB".format(*map(float, figures)) if whole else "–")  # type: ignore[arg-type]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


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


def _figure(text: str) -> str:
    value = float(text)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
