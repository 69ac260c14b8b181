"""Writes docs/results.md, its pictures, and the plan in docs/french.md, from benchmarks/results/french*/.

    python scripts/results.py                        the pages again, from the committed run files
    python scripts/results.py french.tar.gz          take over what benchmarks/french.py left (folder or archive) first
    python scripts/results.py --into french-cpu F    the same for a run on a CPU
    python scripts/results.py --corpus counts.json   take over the counts of scripts/french_corpus.py first

Nothing on the pages is typed by hand. What has no files is said to be not run.
"""

import argparse
import csv
import json
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fat5.cli.recipes import find_recipe
from fat5.tasks.results import draw_confusion
from fat5.yaml_text import read_yaml
from results_files import read_runs
from results_parts import (
    CLOCK,
    IMAGES,
    KINDS,
    Runs,
    ablation,
    clock,
    confused,
    corpus,
    finetuning,
    pretraining,
    sentences,
    table,
    tuned,
    variants,
)
from results_pictures import draw_clock, draw_pretraining, draw_variants

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, PLAN = ROOT / "docs" / "results.md", ROOT / "docs" / "french.md"
PICTURES = ROOT / "docs" / IMAGES
TAKEN = (
    "run.json", "metrics.jsonl", "summary.json", "results.json", "predictions.jsonl", "filled.jsonl", "sentences.jsonl",
    "events.jsonl", "command.txt", "config.yaml", "scores-fat5.json", "scores-t5.json",
)  # fmt: skip
FEW_ROWS = 20
"""Train rows that are committed of a run whose picture shows evaluations alone."""
TEXT = {"fat5-small": 106e9, "fat5-base": 106e9, "fat5-large": 213e9}
"""Preset → tokens of text that the recipe fr/small, fr/base, fr/large takes in, as its heading says."""
PARAMETERS = {"fat5-small": 146_832_896, "fat5-base": 305_184_000, "fat5-large": 973_204_480}
PRICES = (2.0, 4.0)
"""Dollars an hour of one card: assumed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", type=Path, nargs="?", help="folder or .tar.gz that benchmarks/french.py left")
    parser.add_argument("--into", default="french", choices=("french", "french-cpu"))
    parser.add_argument("--corpus", type=Path, help="counts.json of the corpus")
    options = parser.parse_args()
    if options.given is not None:
        take_over(options.given, RESULTS / options.into)
    if options.corpus is not None:
        (RESULTS / "french").mkdir(exist_ok=True)
        shutil.copyfile(options.corpus, RESULTS / "french" / "corpus.json")
    draw()
    PAGE.write_text(render(), encoding="utf-8")
    PLAN.write_text(with_plan(PLAN.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} and the plan of {PLAN.relative_to(ROOT)}")


def take_over(given: Path, target: Path) -> None:
    """Puts the small files of runs in the place of those of the same name in `target`."""
    with tempfile.TemporaryDirectory() as place:
        if given.is_file():
            with tarfile.open(given) as archive:
                archive.extractall(place, filter="data")
            given = Path(place)
        for run in sorted(path.parent for path in given.glob("*/run.json")):
            shutil.rmtree(target / run.name, ignore_errors=True)
            for path in sorted(one for one in run.rglob("*") if one.name in TAKEN):
                if (
                    path.name == "predictions.jsonl"
                    and path.parent.name.startswith("seed-")
                    and path.parent.name != "seed-0"
                ):
                    continue
                kept = target / path.relative_to(given)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(_slim(path, run), encoding="utf-8")
            print(f"took over {run.name}")


def _slim(path: Path, run: Path) -> str:
    text = path.read_text(encoding="utf-8")
    section = json.loads((run / "run.json").read_text(encoding="utf-8"))["section"]
    if path.name != "metrics.jsonl" or section not in ("ablations", "finetune"):
        return text
    rows = text.splitlines(keepends=True)
    train = [number for number, row in enumerate(rows) if '"kind": "train"' in row]
    dropped = set(train) - {*train[:: -(-len(train) // FEW_ROWS) or 1], *train[-1:]}
    return "".join(row for number, row in enumerate(rows) if number not in dropped)


def render(results: Path = RESULTS) -> str:
    """The page, from a folder of results."""
    runs, on_cpu = read_runs(results / "french"), read_runs(results / "french-cpu")
    pictures = [path.name for path in PICTURES.glob("*.png")]
    parts = {
        "The text": corpus(results / "french" / "corpus.json"),
        "Pretraining": pretraining(runs),
        "Twenty sentences, filled in": sentences(runs),
        "Fine-tuning": finetuning(runs, pictures),
        "Learning against the clock": clock(runs, "results-clock.png"),
        "The same on two CPU cores": clock(on_cpu, "results-clock-cpu.png"),
        **{title: ablation(runs, kind) for kind, (title, _) in KINDS.items()},
        "What this cannot show": limits(runs),
    }
    head = """# Results in French

<!-- Written by scripts/results.py from benchmarks/results/french*. Nothing here is typed by hand. -->

Models made with this repository from French text that anyone can get. [french.md](french.md) has every command, from
the packages to these tables, and what full size would cost. Until 29 November 2026 (commit 8ca4b34) T5's bias tables
moved by lr times their RMS, and learned late; they move by lr now ([0134](decisions/0134-bias-tables-move-by-lr.md)).
"""
    return "\n".join([head, *(f"## {title}\n\n{part.strip()}\n" for title, part in parts.items())])


def limits(runs: Runs) -> str:
    """What so little training cannot show."""
    made = runs["small"].train if "small" in runs else []
    told = f"{made[-1]['seconds'] / 60:.0f} minutes and {made[-1]['tokens'] / 1e6:,.0f}M tokens" if made else "Minutes"
    return f"""{told} on one card teach a model the words of manuals and dictionaries, not French:
there is no conversation and little prose in this text. Knowledge of the world, long answers and style are out of reach,
whatever the code. Which positions, mixture or optimizer is best at this size says little about a hundred billion
tokens; [french.md](french.md) says what those cost."""


def with_plan(page: str) -> str:
    """docs/french.md with its plan made anew."""
    pattern = r"(<!-- plan:begin[^>]*-->\n).*?(<!-- plan:end -->)"
    page, count = re.subn(pattern, lambda m: f"{m[1]}{plan()}\n{m[2]}", page, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"expected one part plan on the page, found {count}")
    return page


def plan() -> str:
    """Disk, hours and cost of the CulturaX recipes, from the measured rates."""
    with (RESULTS / "h200-profile.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["provider"].startswith("fat5 compiled")]
    # The plain provider goes last, and wins; a preset that only another one has is shown with its name.
    rows.sort(key=lambda row: row["provider"] == "fat5 compiled")
    rates = {row["case"]: row for row in rows if row["metric"] == "useful tokens/s"}
    low, high = PRICES
    cells = []
    for preset, text in TEXT.items():
        name = f"fr/{preset.removeprefix('fat5-')}"
        run = read_yaml(find_recipe(name), name)["pretrain"]
        data, kept = run["data"], run["keep_last"] + run["keep_best"] + run["steps"] // run["keep_every"]
        tokens = run["steps"] * data["packs_per_step"] * (data["encoder_tokens"] + data["decoder_tokens"])
        disk = [2 * text, kept * 12 * PARAMETERS[preset]]
        known = [preset, f"`{name}`", f"{tokens / 1e9:,.0f}B", *(f"{size / 1e9:,.0f} GB" for size in disk)]
        if f"{preset} 1024" not in rates:
            cells.append([*known, "not measured", "–", "–", "–"])
            continue
        rate = float(rates[f"{preset} 1024"]["p50"])
        hours = tokens / rate / 3600
        cost = f"${low * hours:,.0f} to ${high * hours:,.0f}"
        how = rates[f"{preset} 1024"]["provider"].removeprefix("fat5 compiled")
        cells.append([*known, f"{rate:,.0f}{how}", f"{hours:,.0f}", f"{hours / 24:.1f}", cost])
    heads = ["model", "recipe", "tokens, both sides", "shards", "checkpoints", "tokens/s", "hours", "days", "cost"]
    return "\n".join([
        *table(heads, cells), "",
        f"Rates of one {next(row['machine'] for row in rows if row['machine'])} on documents of 50 to 1,024 tokens",
        "(`benchmarks/results/h200-profile.csv`), budgets taken as full. Shards have two bytes a token of text, a",
        f"checkpoint 12 bytes a parameter, and the recipes keep 14. An hour of a card is assumed to cost ${low:g} to",
        f"${high:g}. The rate of fat5-large is without the gradient checkpointing of its recipe, which a card of",
        "80 GB needs and which costs up to a third more. None of these runs has been made to its end by us.",
    ])  # fmt: skip


def draw() -> None:
    """Every picture whose runs are there."""
    PICTURES.mkdir(exist_ok=True)
    runs, on_cpu = read_runs(RESULTS / "french"), read_runs(RESULTS / "french-cpu")
    found = [runs[name] for name in ("small", "base") if name in runs and runs[name].train and runs[name].evals]
    if found:
        draw_pretraining(found, PICTURES / "results-pretraining.png")
    for of, picture in ((runs, "results-clock.png"), (on_cpu, "results-clock-cpu.png")):
        if any(key in of for key in CLOCK):
            draw_clock(of, {key: name.replace("`", "") for key, name in CLOCK.items()}, PICTURES / picture)
    for kind, (title, _) in KINDS.items():
        if kind != "mixtures" and len(values := variants(runs, kind)) > 1:
            draw_variants(values, title, PICTURES / f"results-{kind}.png")
    for task, starts in tuned(runs).items():
        if start := confused(starts):
            content = starts[start].file("results.json", seed=True)
            draw_confusion(content["labels"], content["confusion"], PICTURES / f"results-{task}.png")


if __name__ == "__main__":
    main()
