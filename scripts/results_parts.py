"""The parts of docs/results.md: Markdown from run files, each "Not run yet." where its files are missing."""

import json
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from fat5.yaml_text import read_yaml
from results_files import Run, differ, interval, shown, time_to

NOT_RUN = "Not run yet."
IMAGES = "images"
CLOCK = {
    "clock_fat5": "FAT5, packed",
    "clock_stock": "stock T5 in `Trainer`, documents padded",
    "clock_joined": "stock T5 in `Trainer`, chunks of joined documents",
}
OTHER_EXAMPLES = """
Chunks of joined documents make another kind of example: dozens of spans each, and never an end after the first. The
held-out examples are whole documents, mostly short ones, so that side's loss on them says little of what it learned,
and no ratio is given. Its tokens a second may be compared, and so may the models, once fine-tuned (above)."""
METRICS = {
    "fr-en": ("bleu", "chrf"), "en-fr": ("bleu", "chrf"), "title": ("rougeL", "exact_match"),
    "module": ("accuracy", "macro_f1"), "man-section": ("accuracy", "macro_f1"), "gloss": ("exact_match",),
    "entities": ("f1",),
}  # fmt: skip
"""Task → the metrics that the table has; the last one judges."""
OF_HUNDRED = ("bleu", "chrf")
"""Metrics that are measured in percent already."""
STARTS = {
    "small": "fat5-small", "base": "fat5-base", "clock_fat5": "FAT5's side of the clock",
    "clock_stock": "stock T5's side, documents", "clock_joined": "stock T5's side, joined chunks",
    "random": "random weights",
}  # fmt: skip
KINDS = {
    "positions": ("Positions", "t5 (default)"),
    "mixtures": ("Mixtures of denoisers", "fat5-anywhere (default)"),
    "optimizers": ("Optimizers", "adamw_scale (default)"),
    "padding": ("Packing against padding", "packed (default)"),
}
"""Ablation → its title, and the name of the run that all are compared with."""
Runs = dict[str, Run]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def corpus(path: Path) -> str:
    """Words by package, with licences, from counts.json of the corpus script."""
    if not path.is_file():
        return NOT_RUN
    counts = json.loads(path.read_text(encoding="utf-8"))
    about = {source["package"]: source for source in counts.get("sources", [])}
    by_package = counts["by_package"]
    words, size = (sum(int(one[key]) for one in by_package.values()) for key in ("words", "bytes"))
    rows = []
    for name, one in sorted(by_package.items(), key=lambda item: -item[1]["words"]):
        source = about.get(name, {})
        known = [source.get(key, "") for key in ("version", "licence")]
        rows.append([f"`{name}`", *known, f"{one['documents']:,}", f"{one['words']:,}"])
    removed = ", ".join(f"{why} ({count:,})" for why, count in counts.get("removed", {}).items() if count)
    lines = [
        f"{words:,} words ({size / 1e6:,.0f} MB) from {len(rows)} packages of Debian and PyPI. Removed: {removed}."
    ]
    return "\n".join([*lines, "", *table(["package", "version", "licence", "documents", "words"], rows)])


def pretraining(runs: Runs) -> str:
    """small and base: size, length, speed, cost, losses."""
    found = [runs[name] for name in ("small", "base") if name in runs and runs[name].train and runs[name].evals]
    if not found:
        return NOT_RUN
    presets = [str(run.facts["preset"]) for run in found]
    cells: dict[str, Callable[[Run], str]] = {
        "parameters": lambda run: number(run.file("summary.json").get("parameters")),
        "steps": lambda run: f"{run.train[-1]['step']:,}" + ("" if run.facts["complete"] else ", stopped by the time"),
        "tokens, both sides": lambda run: f"{run.train[-1]['tokens'] / 1e6:,.1f}M",
        "tokens of text": lambda run: f"{run.train[-1]['raw_tokens'] / 1e6:,.1f}M",
        "training text": training_text,
        "denoisers": mixture,
        "tokens a second, median": lambda run: f"{median(run, 'tokens_per_second'):,.0f}",
        "MFU, median": lambda run: percent(median(run, "mfu")),
        "hours of training": lambda run: f"{run.train[-1]['seconds'] / 3600:.3f}",
        "energy, start and compilation included": energy,
        "validation loss, first": lambda run: f"{run.evals[0]['loss']:.3f}",
        "validation loss, last": lambda run: f"**{run.last_loss():.3f}**",
        "entropy of the targets' frequencies": lambda run: number(run.file("summary.json").get("unigram_entropy"), 3),
        "machine": lambda run: str(run.facts["machine"]),
    }
    lines = [f"![losses]({IMAGES}/results-pretraining.png)", ""]
    lines += table(["", *presets], [[name, *map(cell, found)] for name, cell in cells.items()])
    stops = [row for run in found for row in run.lines("events.jsonl") if row["event"] == "stopped"]
    if stops:
        where = "; ".join(f"after step {row['step']:,}" for row in stops)
        lines += ["", f"Stopped by {stops[0]['signal']} {where}, and continued by the same command, with as many steps"]
        lines += ["as the time allowed. The last losses by denoiser, in nats a token:", ""]
    by = [run.evals[-1].get("by_denoiser", {}) for run in found]
    names = dict.fromkeys(name for of in by for name in of)
    rows = [[name, *(number(of.get(name, {}).get("loss"), 2) for of in by)] for name in names]
    return "\n".join([*lines, *table(["denoiser", *presets], rows), "", *commands(found)])


def mixture(run: Run) -> str:
    """The mixture of a run, by its config.yaml."""
    path = run.folder / "config.yaml"
    return f"`{read_yaml(path, path.name)['data']['mixture']}`" if path.is_file() else "–"


def sentences(runs: Runs) -> str:
    """What the model wrote into the blank of every sentence, unselected."""
    run = runs.get("small")
    found = [] if run is None else list(zip(run.lines("filled.jsonl"), run.lines("sentences.jsonl")))
    if run is None or not found:
        return NOT_RUN
    rows = []
    for filled, whole in found:
        before, _, after = map(cell, filled["prompt"].partition("___"))
        written = cell(filled["completion"].strip()) or "(nothing)"
        rows.append([f"{before}**{written}**{after}", cell(whole["original"])])
    about = f"The first {len(rows)} held-out sentences of 8 to 25 words, their middle hidden: all of them, greedy."
    return "\n".join([about, "", *table([f"filled in by {run.facts['preset']}", "original"], rows)])


def finetuning(runs: Runs, pictures: Sequence[str]) -> str:
    """Tasks by start, with intervals, confusion matrices and examples."""
    found = tuned(runs)
    if not found:
        return NOT_RUN
    lines = ["Each start has the same recipe, but for random weights' learning rate, which is twice as high. Percent;"]
    lines += ["mean of the seeds with the 95% t-interval of the mean.", ""]
    rows = []
    for task, metric in [(one, metric) for one in found for metric in METRICS[one]]:
        values = {start: seeds(found[task].get(start), metric) for start in STARTS}
        best = max(sum(of) / len(of) for of in values.values() if of)
        scale = 1 if metric in OF_HUNDRED else 100
        texts = {start: shown(of, "{:.1f}", scale) for start, of in values.items()}
        marked = (f"**{texts[one]}**" if of and sum(of) / len(of) == best else texts[one] for one, of in values.items())
        rows.append([task, metric, *marked])
    lines += [*table(["task", "metric", *STARTS.values()], rows), ""]
    lines += [verdict(task, starts) for task, starts in found.items()]
    for task, starts in found.items():
        if (start := confused(starts)) and f"results-{task}.png" in pictures:
            lines += [
                "",
                f"![confusion of {task}]({IMAGES}/results-{task}.png)",
                "",
                f"{task}, {STARTS[start]}, seed 0.",
            ]
    return "\n".join([*lines, *(line for task, starts in found.items() for line in examples(task, starts))])


def tuned(runs: Runs) -> dict[str, Runs]:
    """Task → start → run, of those with a result."""
    found: dict[str, Runs] = {}
    for run in runs.values():
        task, start = run.facts.get("task"), run.facts.get("start")
        if run.facts["section"] == "finetune" and start in STARTS and seeds(run, METRICS[task][-1]):
            found.setdefault(task, {})[start] = run
    return {task: found[task] for task in METRICS if task in found}


def verdict(task: str, starts: Runs) -> str:
    """Whether pretraining helps beyond the noise of the seeds."""
    metric = METRICS[task][-1]
    values = {start: seeds(run, metric) for start, run in starts.items()}
    told = []
    for start in (one for one in STARTS if one != "random" and one in values):
        apart = differ(values[start], values.get("random", []))
        better = apart and interval(values[start])[0] > interval(values["random"])[0]
        if apart is not None:
            told.append(f"{STARTS[start]} {'within noise' if not apart else 'better' if better else 'worse'}")
    return f"- {task}, {metric}, beside random weights: {'; '.join(told) or 'too few seeds to tell'}."


def examples(task: str, starts: Runs) -> list[str]:
    """Outputs of seed 0: the two nearest to their targets and the two farthest, of the first test rows."""
    start = next(one for one in STARTS if one in starts)
    texts = [row for row in starts[start].lines("predictions.jsonl", seed=True) if isinstance(row["prediction"], str)]
    if METRICS[task][-1] in ("macro_f1", "f1") or len(texts) < 4:
        return []
    ranked = sorted(texts, key=lambda row: -SequenceMatcher(None, row["prediction"], row["target"]).ratio())
    rows = [[cell(row[key], 160) for key in ("input", "prediction", "target")] for row in ranked[:2] + ranked[-2:]]
    about = (
        f"**{task}**, {STARTS[start]}: of the first {len(texts)} test rows, the two outputs nearest to their targets"
    )
    return ["", f"{about} and the two farthest.", "", *table(["input", "output", "target"], rows)]


def clock(runs: Runs, picture: str) -> str:
    """L1: the sides of the clock, and the time to the other's best loss."""
    found = {key: runs[key] for key in CLOCK if key in runs and runs[key].train and runs[key].evals}
    if not found:
        return NOT_RUN
    first = next(iter(found.values()))
    lines = [
        f"Text, tokenizer, model ({first.facts['preset']}), first weights, optimizer, schedule, precision and card are",
        f"the same ({first.facts['machine']}), and so are the held-out examples: span corruption, 15%, spans of 3.",
        "Stock T5 has the batch that was fastest of those tried; its documents come in batches of similar lengths, in",
        "random order. Seconds are those of training, without evaluations: FAT5's from its first step on, stock's from",
        "the step after which nothing new was compiled. What came before is beside them.",
        f"\n![loss against seconds]({IMAGES}/{picture})\n",
    ]
    heads = [
        "side",
        "compiled",
        "before",
        "seconds",
        "steps",
        "useful tokens/s",
        "useful share",
        "last loss",
        "best loss",
    ]
    rows = []
    for key, run in found.items():
        summary, losses = run.file("summary.json"), run.curve()[1]
        before = summary.get("seconds_before_the_clock", run.train[0]["seconds"])
        share = summary.get("useful_share", summary.get("encoder_fill"))
        seconds = float(run.seconds([run.train[-1]["step"]])[0])
        rate = number(run.train[-1]["tokens"] / seconds) if seconds else "–"
        length = [f"{before:.0f} s", f"{seconds:.0f}", f"{run.train[-1]['step']:,}", rate, percent(share)]
        compiled = summary.get("compiled", first.facts.get("device") == "GPU")
        rows.append([CLOCK[key], "yes" if compiled else "no", *length, f"{losses[-1]:.3f}", f"**{losses.min():.3f}**"])
    lines += table(heads, rows)
    if {"clock_fat5", "clock_stock"} <= found.keys():
        lines.append(f"\n{race(found['clock_fat5'], found['clock_stock'], CLOCK['clock_stock'])}")
    if "clock_joined" in found:
        lines.append(OTHER_EXAMPLES)
    return "\n".join([*lines, "", *commands(list(found.values()))])


def race(ours: Run, other: Run, name: str) -> str:
    """Which side reaches the other's best loss, and when."""
    (at, losses), best = other.curve(), float(ours.curve()[1].min())
    goal, taken = float(losses.min()), float(at[int(losses.argmin())])
    reached = time_to(ours, goal)
    if reached is not None:
        sooner = f": **{taken / reached:.1f} times sooner**" if 0 < reached < taken else ""
        return f"FAT5 reaches the best loss of {name} ({goal:.3f}, after {taken:.0f} s) after {reached:.0f} s{sooner}."
    back = time_to(other, best)
    told = f"FAT5 does not reach the best loss of {name} ({goal:.3f})"
    return f"{told}, which reaches FAT5's ({best:.3f}) after {back:.0f} s." if back is not None else f"{told}."


def ablation(runs: Runs, kind: str) -> str:
    """Variants beside the default, by the last validation loss; mixtures under the denoisers of two."""
    values = variants(runs, kind)
    if len(values) < 2:
        return NOT_RUN
    default, one = next(iter(values)), next(run for run in runs.values() if run.facts.get("kind") == "default")
    length = f"{one.train[-1]['step']:,} steps of {median(one, 'step_tokens'):,.0f} tokens"
    made = f"commit {one.facts['commit']}, {one.facts['date']}"
    lines = [f"{one.facts['preset']}, {length}, {one.facts['machine']}, {made}."]
    lines += ["", f"![{kind}]({IMAGES}/results-{kind}.png)"] if kind != "mixtures" else []
    rows = []
    for name, of in values.items():
        apart = differ(of, values[default])
        lower = interval(of)[0] < interval(values[default])[0]
        told = (
            "too few seeds to tell"
            if apart is None
            else "within noise"
            if not apart
            else "better"
            if lower
            else "worse"
        )
        rows.append([name, shown(of), "" if name == default else told])
    lines += ["", *table(["variant", "validation loss", "beside the default"], rows)] if kind != "mixtures" else []
    lines += mixtures(runs, list(values)) if kind == "mixtures" else []
    if kind == "padding":
        shares = [
            run.file("summary.json").get("useful_share") for run in runs.values() if run.facts.get("kind") == kind
        ]
        packed = percent(one.file("summary.json").get("encoder_fill"))
        lines += [
            "",
            f"The padded side is stock T5 on the same examples, by step. Useful share of the tokens: packed {packed},",
        ]
        lines += [f"padded {percent(shares[0])}, though its batches group texts of similar lengths."]
    return "\n".join(lines)


def mixtures(runs: Runs, names: Sequence[str]) -> list[str]:
    """Each mixture's models scored under the same denoisers, and after fine-tuning."""
    rows = []
    for name in names:
        own = [run for run in runs.values() if variant(run, "mixtures") == name]
        scores = [[run.file(f"scores-{of}.json").get("loss") for run in own] for of in ("fat5", "t5")]
        after = [value for run in own for value in seeds(runs.get(f"fr-en-from-{run.name}"), "chrf")]
        rows.append([name, *(shown([one for one in of if one is not None]) for of in scores), shown(after, "{:.1f}")])
    heads = ["trained on", "loss under fat5's denoisers", "loss under t5's", "fr-en after fine-tuning, chrF"]
    return [
        "",
        "A mixture is best at its own denoisers; what it is for, the last column tells.",
        "",
        *table(heads, rows),
    ]


def variants(runs: Runs, kind: str) -> dict[str, list[float]]:
    """Variant → last validation loss of each complete seed, the default first."""
    found: dict[str, list[float]] = {KINDS[kind][1]: []}
    for run in runs.values():
        name = variant(run, kind)
        if name is not None and run.facts["complete"] and run.evals:
            found.setdefault(name, []).append(run.last_loss())
    return {name: of for name, of in found.items() if of} if found[KINDS[kind][1]] else {}


def variant(run: Run, kind: str) -> str | None:
    """The name of a run in an ablation; None where it has no part in it."""
    if run.facts["section"] != "ablations" or run.facts["kind"] not in ("default", kind):
        return None
    return KINDS[kind][1] if run.facts["kind"] == "default" else str(run.facts["variant"])


def confused(starts: Runs) -> str:
    """The first start with a confusion matrix."""
    return next(
        (one for one in STARTS if one in starts and starts[one].file("results.json", seed=True).get("confusion")), ""
    )


def seeds(run: Run | None, metric: str) -> list[float]:
    """A metric of each seed that came to its end."""
    paths = [] if run is None else [folder / "results.json" for folder in run.seeds()]
    found = [json.loads(path.read_text(encoding="utf-8"))["metrics"] for path in paths if path.is_file()]
    values = [metrics[metric].get("value") for metrics in found]  # those of all seeds together have a mean
    return [float(value) for value in values if value is not None]


def commands(runs: Sequence[Run]) -> list[str]:
    """The commands of some runs, folded, with versions, commit and date."""
    files = [run.folder / "command.txt" for run in runs]
    lines = [line for path in files if path.is_file() for line in path.read_text(encoding="utf-8").splitlines()]
    made = dict.fromkeys(f"{run.facts['versions']}, commit {run.facts['commit']}, {run.facts['date']}" for run in runs)
    return ["<details><summary>Commands</summary>", "", "```text", *lines, "```", "", *made, "", "</details>"]


def median(run: Run, key: str) -> float:
    """Of a key of the train rows, without the first fifth."""
    values = sorted(row[key] for row in run.train[len(run.train) // 5 :] if row.get(key) is not None)
    return float(values[len(values) // 2]) if values else float("nan")


def training_text(run: Run) -> str:
    """Documents and tokens of the shards, and passes over them."""
    text = run.facts["training_text"]
    passes = run.train[-1]["raw_tokens"] / text["tokens"]
    return f"{text['tokens'] / 1e6:,.1f}M tokens in {text['documents']:,} documents, {passes:.2g} passes"


def energy(run: Run) -> str:
    """Energy and mean power, if the card told them."""
    facts = run.facts
    return f"{facts['energy_wh']:.0f} Wh, mean {facts['power_w']:.0f} W" if "energy_wh" in facts else "not told"


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.1%}"


def cell(text: str, most: int = 10**6) -> str:
    """A text inside a table."""
    text = text if len(text) <= most else f"{text[:most]}…"
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
