"""Publishes benchmark results: into benchmarks/results/, and from there into the README and the pages.

    python scripts/publish.py                  write the pages again from benchmarks/results/
    python scripts/publish.py bench            take over the CSV files of `make bench` first
    python scripts/publish.py --demo demo      take over a finished demo's summary and plot first

A published file keeps the rows of other machines: a ratio measured on two processors stands in two columns. On a page,
the part between `<!-- NAME:begin … -->` and `<!-- NAME:end -->` is replaced; nothing there is typed by hand.
The pages' GPU figures are written by update_performance.py.
"""

import argparse
import csv
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = RESULTS / "demo.json"
PLOT = ROOT / "docs" / "images" / "demo-loss.png"
PAGES = {
    "README.md": ("figure", "demo"),
    "README.fr.md": ("figure-fr", "demo-fr"),
    "docs/demo.md": ("denoisers",),
    "docs/performance.md": ("benchmarks",),
    "docs/generate.md": ("decoding",),
    "docs/prepare.md": ("prepare-scale",),
    "docs/compatibility.md": ("parity", "generation", "accelerate", "accelerate-memory"),
    "docs/reliability.md": ("faults", "reliability"),
}
"""Page → its generated parts."""

FAMILIES = ["v1.0", "v1.1", "mT5", "umT5", "ByT5"]
ENCODERS = ["T5 encoder", "umT5 encoder"]
# Part → result file, heading of the first column, columns as (heading, provider, metric).
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
    "prepare-scale": (
        "prepare_scale",
        "text",
        [
            ("largest process", "fat5 prepare", "peak memory of a process"),
            ("all processes", "fat5 prepare", "peak memory of all"),
            ("main process killed", "fat5 prepare", "main killed"),
            ("a worker killed", "fat5 prepare", "worker killed"),
            ("files equal to the undisturbed run's", "fat5 prepare", "equal files"),
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
# Result file, metric, words that case or provider hold, what the table says, target.
FIGURES = [
    ("training_cpu", "speed-up", "", "training, tokens/s over stock T5 (sdpa)", "≥ 2.5, compiled 1.8"),
    ("attention_cpu", "time ratio", "", "attention with a learned bias, time over SDPA with it detached", "≤ 1.15"),
    ("attention_cpu", "speed-up", "", "attention, times faster than SDPA with a bias gradient", "≥ 1.5, 2.2"),
    ("attention_cpu", "peak memory ratio", "", "attention, peak memory of SDPA with a bias over ours", "≥ 20"),
    ("ul2", "speed", "", "UL2 pipeline on one core, times a per-example NumPy collator", "≥ 10"),
    ("ul2", "useful tokens", "fat5", "UL2 pipeline on one core, tokens a second", "≥ 2M, 6M"),
    ("ul2", "encoder fill", "fat5", "fill of the encoder budget", "≥ 0.99"),
    ("ul2", "decoder fill", "fat5", "fill of the decoder budget", "≥ 0.97"),
    ("prepare", "over encode_batch", "", "`fat5 prepare` over bare `tokenizers`", "≥ 0.8"),
    ("startup", "time", "fat5", "start of the command, and what the package adds to PyTorch's import", "< 0.3, 0.2 s"),
]
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="CSV files that `make bench` left")
    parser.add_argument("--demo", type=Path, help="folder of a finished demo")
    options = parser.parse_args()
    for file in sorted(options.folder.glob("*.csv")) if options.folder else []:
        take_over(file)
    if options.demo is not None:
        take_over_demo(options.demo)
    for page, names in PAGES.items():
        path = ROOT / page
        path.write_text(render(path.read_text(encoding="utf-8"), names), encoding="utf-8")
        print(f"wrote {page}")


def take_over(file: Path) -> None:
    """Puts a new file's rows in the place of the published ones of the same machine."""
    new, target = read(file), RESULTS / file.name
    machines = {row["machine"] for row in new}
    kept = [row for row in read(target) if row["machine"] not in machines]
    with target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(new[0]))
        writer.writeheader()
        writer.writerows([*kept, *new])
    print(f"{file.name}: {len(new)} rows of {', '.join(sorted(machines))}, {len(kept)} rows of other machines kept")


def take_over_demo(folder: Path) -> None:
    """Keeps a demo's summary under this machine's name, and its plot."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from measure import machine

    demos = demo_runs()
    demos.pop(machine(), None)
    demos[machine()] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    DEMO.write_text(json.dumps(demos, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(folder / "loss.png", PLOT)


def render(page: str, names: Sequence[str]) -> str:
    """The page with its generated parts made anew from the files."""
    parts = {"figure": figure_part, "demo": demo_part, "denoisers": denoisers_part, "benchmarks": benchmark_part}
    parts |= {"figure-fr": french_figure_part, "demo-fr": french_demo_part}
    parts |= {"faults": fault_part, "reliability": reliability_part}
    for name in names:
        content = parts[name]() if name in parts else tables(*TABLES[name])
        pattern = rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)"
        page, count = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"expected one part {name!r} on the page, found {count}")
    return page


def figure_part() -> str:
    """The one figure of the README: the GPU's rate, and the range of ratios seen on CPUs."""
    machine, rate, mfu, triton, least, most = _figures_of_readme()
    return f"""On one {machine} the base model (305M parameters) pretrains at **{rate:,.0f} tokens a second**
({mfu:.0%} of the card's bf16 peak) with `fat5[hopper]`, at {triton:,.0f} without.
On two CPU cores a small one trains {least:.1f} to {most:.1f} times as fast as stock T5: by processor,
compilation and the padding of stock's batches ([performance](docs/performance.md))."""


def french_figure_part() -> str:
    """The same in French."""
    machine, rate, mfu, triton, least, most = _figures_of_readme()
    return f"""Sur un {machine}, le modèle de base (305\u00a0M de paramètres) se pré-entraîne à
**{_french(rate, 0)} jetons par seconde** ({100 * mfu:.0f}\u202f% de la puissance bf16 de crête de la carte) avec
`fat5[hopper]`, à {_french(triton, 0)} sans. Sur deux cœurs de processeur, un petit modèle s’entraîne de
{_french(least, 1)} à {_french(most, 1)} fois plus vite que le T5
d’origine, selon le processeur, la compilation et le remplissage des lots de ce dernier
([performances](docs/performance.md))."""


def _figures_of_readme() -> tuple[str, float, float, float, float, float]:
    """The GPU, its tokens/s and MFU, tokens/s by Triton alone, and the least and the largest ratio on CPUs."""
    ratios = [float(row["p50"]) for row in results("training_cpu") if row["metric"] == "speed-up"]
    found = {(row["provider"], row["metric"]): row for row in results("h200-profile") if row["case"] == "fat5-base 512"}
    rate, mfu, triton = (
        float(found[how, metric]["p50"])
        for how, metric in (
            ("fat5 compiled", "useful tokens/s"), ("fat5 compiled", "MFU"),
            ("fat5 compiled, Triton's attention", "useful tokens/s"),
        )
    )  # fmt: skip
    machine = next(row["machine"] for row in results("h200-profile") if row["machine"])
    return machine, rate, mfu, triton, min(ratios), max(ratios)


def _french(value: float, decimals: int) -> str:
    """A number as French writes it: thousands apart, and a comma before the decimals."""
    return f"{value:,.{decimals}f}".replace(",", "\u202f").replace(".", ",")


def demo_runs() -> dict[str, dict]:
    """Machine → summary, the newest last."""
    runs: dict[str, dict] = json.loads(DEMO.read_text(encoding="utf-8"))
    return runs


def demo_part() -> str:
    """What the demo makes, and its range of times."""
    runs = demo_runs()
    newest = list(runs.values())[-1]
    times = "; ".join(
        f"{run['seconds']:.0f} seconds ({run['tokens_per_second']:,.0f} tokens a second) on {machine}"
        for machine, run in runs.items()
    )
    sample, size, tokens = newest["samples"][0], newest["parameters"] / 1e6, newest["train_tokens"] / 1e6
    first, last, unigram = (newest[key] for key in ("val_loss_first", "val_loss_last", "unigram_entropy"))
    return f"""The demo's model has {size:.1f} million parameters and sees {tokens:.1f} million tokens: {times}.
Validation loss falls from {first:.2f} to **{last:.2f}** nats a token; token frequencies alone give {unigram:.2f}.
“{sample["prompt"]}” becomes “{sample["text"]}”"""


def french_demo_part() -> str:
    """The same in French."""
    runs = demo_runs()
    newest = list(runs.values())[-1]
    times = "\u202f; ".join(
        f"{run['seconds']:.0f} secondes ({_french(run['tokens_per_second'], 0)} jetons par seconde) sur {machine}"
        for machine, run in runs.items()
    )
    sample, size, tokens = newest["samples"][0], newest["parameters"] / 1e6, newest["train_tokens"] / 1e6
    first, last, unigram = (_french(newest[key], 2) for key in ("val_loss_first", "val_loss_last", "unigram_entropy"))
    seen = f"{_french(tokens, 1)} million{'s' * (tokens >= 2)} de jetons"
    return f"""Le modèle de la démonstration a {_french(size, 1)} millions de paramètres et lit {seen}\u00a0: {times}.
Sa perte de validation passe de {first} à **{last}** nats par jeton\u202f; leur seule fréquence donne {unigram}.
«\u00a0{sample["prompt"]}\u00a0» devient «\u00a0{sample["text"]}\u00a0»"""


def denoisers_part() -> str:
    """Loss by denoiser, fill and samples of the newest demo."""
    summary = list(demo_runs().values())[-1]
    rows = "\n".join(f"| {name} | {loss:.2f} |" for name, loss in summary["val_loss_by_denoiser"].items())
    headings = {"prompt": "prompt", "text": "completed", "original": "as it was written"}
    shown = [key for key in headings if key in summary["samples"][0]]
    rows_shown = [[headings[key] for key in shown]]
    rows_shown += [[_text(sample[key]) for key in shown] for sample in summary["samples"]]
    head, *lines = [f"| {' | '.join(row)} |" for row in rows_shown]
    samples = "\n".join([head, "|---" * len(shown) + "|", *lines])
    fill = f"Encoder fill {summary['encoder_fill']:.1%}, decoder fill {summary['decoder_fill']:.1%}"
    return f"""| denoiser | validation loss |
|---|---|
{rows}

{fill}, tokens dropped: {summary["tokens_dropped"]}.

{samples}"""


def benchmark_part() -> str:
    """The CPU's ratios, a column a machine: median (p20 to p80)."""
    chosen = [
        (says, target, row)
        for name, metric, word, says, target in FIGURES
        for row in results(name)
        if row["metric"].startswith(metric) and word in row["case"] + row["provider"]
    ]
    machines = list(dict.fromkeys(row["machine"] for _, _, row in chosen))
    lines = [f"| what | case | target | {' | '.join(machines)} |", "|---" * (3 + len(machines)) + "|"]
    lines_of: dict[tuple[str, ...], dict[str, Row]] = {}
    for says, target, row in chosen:
        case = f"{row['case']}: {row['provider']}, {row['metric']}"
        lines_of.setdefault((says, case, target), {})[row["machine"]] = row
    for head, cells in lines_of.items():
        lines.append(f"| {' | '.join([*head, *(_spread(cells.get(machine)) for machine in machines)])} |")
    versions = {f"{row['machine']}: {row['versions']}, {row['date']}" for _, _, row in chosen}
    return "\n".join([*lines, "", *(f"- {line}" for line in sorted(versions))])


def fault_part() -> str:
    """The twenty rows of the fault table."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from fault_table import fault_table

    costs = [row for row in results("h100-reproducible") if row["provider"] == "now"]
    return fault_table({f"{row['case']}: {row['metric']}": _cell(row) for row in [*results("reliability"), *costs]})


def reliability_part() -> str:
    """Every figure of benchmarks/reliability.py: median, or count, and the range of times."""
    lines = ["| case | what | | 20% to 80% | repeats | commit, date |", "|---" * 6 + "|"]
    rows = results("reliability")
    for row in rows:
        spread = "" if row["unit"] == "count" else f"{_figure(float(row['p20']))} to {_figure(float(row['p80']))}"
        cells = [row["case"], row["metric"], _cell(row), spread, row["repeats"], f"{row['commit']}, {row['date']}"]
        lines.append(f"| {' | '.join(cells)} |")
    machines = sorted({f"{row['machine']}; {row['versions']}." for row in rows})
    return "\n".join([*lines, "", *machines])


def tables(file: str, heading: str, columns: list[tuple[str, str, str]]) -> str:
    """A table a machine; says so where nothing is measured yet."""
    rows = results(file)
    if not rows:
        return f"Not measured yet: `python benchmarks/{file}.py`."
    machines = dict.fromkeys(row["machine"] for row in rows)
    return "\n\n".join(_table([row for row in rows if row["machine"] == name], heading, columns) for name in machines)


def _table(rows: list[Row], heading: str, columns: list[tuple[str, str, str]]) -> str:
    found = {(row["case"], row["provider"], row["metric"]): row for row in rows}
    lines = [f"| {heading} | {' | '.join(name for name, _, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [found.get((case, provider, metric)) for _, provider, metric in columns]
        if any(cells):
            lines.append(f"| {case} | {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, "", f"{rows[0]['machine']}; {rows[0]['versions']}; {rows[0]['date']}."])


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    value = float(row["p50"])
    if row["unit"] == "share":
        return f"{value:.0%}" if value in (0.0, 1.0) else f"{value:.2%}"
    if row["unit"] == "relative":
        return "0" if value == 0 else f"{value:.1e}"
    if row["unit"] == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if row["unit"] == "ms":
        return f"{_figure(value)} ms"
    if row["unit"] == "s":
        return f"{_figure(value)} s"
    return _spread(row) if row["unit"] == "ratio" else _figure(value)


def _spread(row: Row | None) -> str:
    if row is None:
        return "–"
    p20, p50, p80 = (_figure(float(row[key])) for key in ("p20", "p50", "p80"))
    return f"**{p50}** ({p20} to {p80})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _text(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def results(name: str) -> list[Row]:
    """Rows of a published result file, none where there is no such file."""
    return read(RESULTS / f"{name}.csv")


def read(path: Path) -> list[Row]:
    """Rows of a CSV file, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
