"""French for real: pretraining, fine-tuning, learning against the clock, ablations, by one unattended command.

    python benchmarks/french.py DATA --output_dir results --sections small,finetune --seconds 240,300

DATA holds `shards/` (of `fat5 prepare`), `shards-en/` if wanted (English, for translation), and
`tasks/NAME/{train,validation,test}.jsonl` (also .gz; of french_tasks.py).

    rehearsal    the first steps of small, base and the clock, side by side: later runs find their code compiled
    small        fat5-small through `fat5 pretrain`, stopped by SIGTERM in the middle and continued; sentences filled in
    base         fat5-base for as many steps, if there is time
    clock        learning against the clock (L1): FAT5, stock T5 in Trainer, stock T5 on joined chunks, each for
                 --clock_seconds of training; clock_fat5, clock_stock, clock_joined are the three alone
    finetune     each task from small, base, both sides of the clock and random weights, several seeds, side by side
    ablations    at the size of fat5-demo, several seeds, side by side: positions, mixtures, optimizers, padding, which
                 are sections of their own too; then a task from each mixture

`--seconds` has one number a section, or one for all. A run is a folder of OUTPUT_DIR with run.json (what it is, where
it ran, whether it came to its end), metrics.jsonl and the like, which scripts/results.py reads. Complete runs are
skipped when the command is given again, and a killed one leaves what it has. Models stay in --work: sections that
fine-tune need it. --archive writes all of OUTPUT_DIR into one file every 20 seconds.
"""

import argparse
import gzip
import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fat5.data import read_manifest
from fat5.train.log.metrics import read_rows
from french_runs import FAT5, GPU, Bench, Job, steps_a_second
from gpu_step import say

HERE = Path(__file__).parent
START, RESTART, END = (100.0, 50.0, 15.0) if GPU else (10.0, 10.0, 10.0)
"""Seconds that a run needs until its first step, again with warm caches, and from its last step to its model."""
CALIBRATION = 8.0 if GPU else 30.0
"""Seconds of training after which the steps of the clock's FAT5 run are planned, where RATES does not know its rate."""
RATES = {"fat5-small": 750e3, "fat5-base": 420e3} if GPU else {}
"""Tokens/s by which the steps of an unmeasured run are planned: those of one H200 (benchmarks/results)."""
UNKNOWN_RATE = 1e6 if GPU else 4e3
DECAY = 0.2
"""Share of a run's steps over which its rate falls."""
KINDS = ("positions", "mixtures", "optimizers", "padding")
POSITIONS = ("alibi", "rope", "fire", "absolute", "none")
MIXTURES = ("fat5", "ul2", "t5", "prefix-lm")
OPTIMIZERS = ("adamw", "adafactor", "muon", "lamb")
TEXT = {"task": "text-to-text", "languages": "[fr,en]"}
PAIRS = TEXT | {"data.batch_size": 128, "epochs": 4, "data.max_source_tokens": 256, "max_new_tokens": 96}
CLASSES = {"task": "sequence-classification", "metric": "macro_f1", "data.max_source_tokens": 512, "epochs": 8}
TASKS: dict[str, dict[str, Any]] = {
    "fr-en": PAIRS,
    "en-fr": PAIRS,
    "module": CLASSES,
    "gloss": TEXT | {"data.batch_size": 256, "epochs": 3, "data.max_source_tokens": 128, "max_new_tokens": 16},
    "title": TEXT | {"data.batch_size": 32, "epochs": 8, "data.max_source_tokens": 512, "max_new_tokens": 24},
    "man-section": CLASSES,
    "entities": {"task": "token-classification", "metric": "f1", "data.max_source_tokens": 256, "epochs": 3},
}
"""Task → keys of `fat5 finetune`."""
TASK_OF_MIXTURES = "fr-en"
LEARNING_RATES = {"random": 0.02}
LEARNING_RATE = 0.01
STARTS = ("small", "random", "clock_stock", "clock_joined", "clock_fat5", "base")
SENTENCES = 20
KINDS_OF_TEXT = ("title", "gloss", "man-section", "module", "fr-en")
PROSE, FRENCH = re.compile(r"[A-ZÀÉÊ][^_]*\.$"), re.compile(r"\b(?:les?|la|des?|du|une?|et|est|dans|pour|qui)\b")
TINY_MODEL = "{d_model: 32, d_ff: 64, num_layers: 1, num_decoder_layers: 1, num_heads: 2, d_kv: 16}"
TINY_DATA = {
    "data.max_tokens": 64, "data.encoder_tokens": 512, "data.packs_per_step": 1, "data.packs_per_micro_batch": 1,
    "data.num_workers": 0, "eval_tokens": 512, "schedule.warmup_steps": 1, "model.overrides": TINY_MODEL,
}  # fmt: skip
TINY_TASK = {
    "data.max_examples": 60, "data.max_source_tokens": 48, "data.max_target_tokens": 16, "max_new_tokens": 4,
    "epochs": 1, "data.batch_size": 16, "data.num_workers": 0,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True, help="small files, a folder a run")
    parser.add_argument("--sections", default="small,finetune", help=f"in order, of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", default="300", help="of each section, in order; one number for all")
    parser.add_argument("--work", type=Path, default=Path("/tmp/fat5-french"), help="models and checkpoints")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of OUTPUT_DIR, written again and again")
    parser.add_argument("--preset", default="fat5-small" if GPU else "fat5-demo", help="of small and of the clock")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", default=",".join(TASKS), help="those that are there are taken")
    parser.add_argument("--starts", default=",".join(STARTS), help="those that have a model are taken, and random")
    parser.add_argument("--at_once", type=int, default=8 if GPU else 1, help="runs side by side, on each card")
    parser.add_argument("--clock_seconds", type=float, default=120.0, help="of training, of each side of the clock")
    parser.add_argument("--ablation_steps", type=int, default=600)
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model and few steps: everything in minutes on a CPU"
    )
    options = parser.parse_args()
    names = options.sections.split(",")
    given = [float(one) for one in options.seconds.split(",")]
    if len(given) not in (1, len(names)) or set(names) - set(SECTIONS):
        parser.error(f"{len(names)} sections of {', '.join(SECTIONS)}, and one number or as many of seconds")
    if options.tiny:
        options.ablation_steps = 4
    os.environ.setdefault("PYTHONPATH", str(HERE.parent / "src"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bench = Bench(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for name, seconds in zip(names, given * (len(names) // len(given))):
            say(f"== {name}, {seconds:.0f} s")
            bench.deadline = time.monotonic() + seconds
            try:
                SECTIONS[name](bench)
            except Exception:  # the next section has its own chance
                traceback.print_exc(limit=6)
    finally:
        bench.stop()


def keys(values: dict[str, Any]) -> list[str]:
    """Keys and values as words of a command line."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def pretraining(bench: Bench, preset: str, **more: Any) -> list[str]:
    """The words of a `fat5 pretrain` with the recipe of this corpus."""
    # In proportion to their tokens, as the stock side reads them.
    sources = [{"path": str(one), "weight": round(read_manifest(one).tokens("train") / 1e6, 3)} for one in bench.shards]
    values = {"model.preset": preset, "data.sources": json.dumps(sources)}
    if not GPU:
        values |= {"data.num_workers": 0, "data.packs_per_micro_batch": 1}
    if bench.tiny:
        values |= TINY_DATA
    elif not GPU:
        values |= {
            "data.max_tokens": 256, "data.encoder_tokens": 4096, "data.packs_per_step": 1, "eval_tokens": 8192,
            "optimizer.lr": 0.04,
        }  # fmt: skip
    return ["--config", "fr/packages", *keys({**values, **more})]


def planned(preset: str, train_seconds: float, both_sides: float = 1.7) -> int:
    """Steps that a run makes in so many seconds, by RATES; the tokens of both sides are 1.7 times those of the encoder,
    or 1.24 times under the mixture t5.
    """
    tokens = both_sides * (2 * 16384 if GPU else 4096)
    return max(20, int(train_seconds * RATES.get(preset, UNKNOWN_RATE) / tokens))


def scheduled(steps: int) -> dict[str, Any]:
    """Length, decay and evaluations of a run."""
    return {
        "steps": steps, "schedule.decay_steps": max(1, int(steps * DECAY)), "eval_every": max(1, steps // 20),
        "save_every": 10**6, "log_every": max(10, steps // 50), "schedule.warmup_steps": max(1, min(100, steps // 15)),
    }  # fmt: skip


def small(bench: Bench) -> None:
    """The preset, interrupted once and lengthened to fill its time; then the sentences."""
    preset = bench.options.preset
    train_seconds = 2.0 if bench.tiny else max(10.0, bench.left() - START - RESTART - END)
    # The tiny one cannot come to its end before it is interrupted.
    length = (
        scheduled(10_000) | {"schedule.warmup_steps": 1} if bench.tiny else scheduled(planned(preset, train_seconds))
    )
    words = pretraining(bench, preset, **length)

    def lengthened(folder: Path) -> list[str]:
        """Steps for the seconds that are left, by those made before the interruption."""
        train = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
        more = 4 if bench.tiny else int(0.95 * steps_a_second(train) * (bench.left() - RESTART - END))
        steps = train[-1]["step"] + max(4, more)
        return keys({"steps": steps, "schedule.decay_steps": max(1, int(steps * DECAY))})

    facts = {"section": "small", "preset": preset, "seed": 0, "interrupted": True}
    job = Job("small", facts, [*FAT5, "pretrain", *words], after=lambda folder, kept: fill_in(bench, folder, kept))
    bench.run_alone(job, (train_seconds / 2, None), (math.inf, lengthened))


def base(bench: Bench) -> None:
    """fat5-base for the steps of small, or those that there is time for."""
    preset = "fat5-base" if GPU else "fat5-demo"
    steps = 12 if bench.tiny else planned(preset, bench.left() - START - END)
    if bench.is_complete("small"):
        train = [row for row in read_rows(bench.output / "small" / "metrics.jsonl") if row["kind"] == "train"]
        steps = min(steps, train[-1]["step"])
    words = pretraining(bench, preset, **scheduled(steps))
    job = Job("base", {"section": "base", "preset": preset, "seed": 0}, [*FAT5, "pretrain", *words])
    bench.run_alone(job, (math.inf, None))


def fill_in(bench: Bench, folder: Path, kept: Path) -> list[list[str]]:
    """The command that fills the blanks of held-out sentences, as they come."""
    with (kept / "sentences.txt").open("w", encoding="utf-8") as file:
        file.writelines(f"{blanked}\n" for blanked, _ in sentences(bench))
    with (kept / "sentences.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": one, "original": whole}) + "\n" for one, whole in sentences(bench))
    words = {"model": folder, "input": kept / "sentences.txt", "output": kept / "filled.jsonl", "json_lines": "true"}
    return [[*FAT5, "generate", *keys({**words, "max_new_tokens": 16})]]


def sentences(bench: Bench) -> Iterator[tuple[str, str]]:
    """The first French sentence of 8 to 25 words of held-out texts, without its middle third of at most 3 words; from
    each kind of text in turn, none twice.
    """
    kinds = [path for task in KINDS_OF_TEXT if (path := split_file(bench.tasks / task, "test"))]
    turns = [first_sentences(path) for path in kinds]
    seen = set[str]()
    while turns and len(seen) < SENTENCES:
        turn = turns.pop(0)
        whole = next((one for one in turn if one not in seen), None)
        if whole is None:
            continue
        turns.append(turn)
        seen.add(whole)
        words = whole.split()
        width = min(3, len(words) // 3)
        first = (len(words) - width) // 2
        yield " ".join([*words[:first], "___", *words[first + width :]]), whole


def first_sentences(path: Path) -> Iterator[str]:
    """Of each row its first sentence that is French prose."""
    for row in rows_of(path):
        for sentence in re.split(r"(?<=[.!?])\s+|\n", str(row.get("source") or row.get("text"))):
            words = sentence.split()
            if 8 <= len(words) <= 25 and PROSE.match(sentence) and len(set(FRENCH.findall(sentence.lower()))) > 1:
                yield " ".join(words)
                break


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def split_file(folder: Path, split: str) -> Path | None:
    return next((path for path in sorted(folder.glob(f"{split}.jsonl*"))), None)


def clock(bench: Bench) -> None:
    """The three runs of the clock, one after another."""
    for name in CLOCK:
        on_the_clock(bench, name)


def on_the_clock(bench: Bench, name: str) -> None:
    """One run of the clock."""
    job = clock_job(bench, name)
    if name != "clock_fat5":
        bench.run_alone(job, (math.inf, None))
    elif not bench.is_complete(name):
        train_seconds = job.facts["train_seconds"]
        if not bench.tiny and bench.options.preset not in RATES:
            a_second = bench.measure_rate(replace(job, name="calibration"), CALIBRATION)
            say(f"{name}: {a_second:.3g} steps/s")
            job.command += keys(scheduled(int(0.97 * a_second * train_seconds))) if a_second else []
        # Evaluations do not count, and the steps are those that fit: this ends a run that went wrong.
        bench.run_alone(job, (1.2 * train_seconds + END, None))


def clock_job(bench: Bench, name: str) -> Job:
    """Text, model, optimizer, schedule and validation batches are the same in all runs of the clock."""
    preset, train_seconds = bench.options.preset, 6.0 if bench.tiny else bench.options.clock_seconds
    values = {"data.mixture": "t5", **scheduled(12 if bench.tiny else planned(preset, train_seconds, 1.24))}
    facts = {"section": "clock", "preset": preset, "seed": 0, "train_seconds": train_seconds, "text": CLOCK[name]}
    words = pretraining(bench, preset, **values)
    if name == "clock_fat5":
        return Job(name, facts, [*FAT5, "pretrain", *words])
    return Job(name, facts, [*stock(), "--train_seconds", str(train_seconds), "--text", CLOCK[name], *words])


def rehearsal(bench: Bench) -> None:
    """The first steps of small, base and the clock's two sides of documents, side by side: their compiled code serves
    the runs.
    """
    presets = {"small": bench.options.preset, "base": "fat5-base" if GPU else "fat5-demo"}
    words = {name: pretraining(bench, preset, **scheduled(10_000)) for name, preset in presets.items()}
    jobs = [
        *(Job(name, {}, [*FAT5, "pretrain", *words[name]]) for name in presets),
        clock_job(bench, "clock_fat5"),
        clock_job(bench, "clock_stock"),
    ]
    bench.rehearse([replace(job, name=f"rehearsed-{job.name}") for job in jobs])


def stock() -> list[str]:
    return [sys.executable, "-W", "ignore", str(HERE / "french_stock.py")]


def finetune(bench: Bench) -> None:
    """Starts and tasks, a start after another: a task's compiled code serves the later starts."""
    starts = [name for name in bench.options.starts.split(",") if name == "random" or bench.model(name) is not None]
    jobs = [job for start in starts for task in bench.options.tasks.split(",") if (job := tuning(bench, task, start))]
    if not jobs:
        say(f"no task of {bench.options.tasks} in {bench.tasks}")
    bench.run_together(jobs, bench.options.at_once)


def tuning(bench: Bench, task: str, start: str) -> Job | None:
    """Fine-tuning on a task from a pretrained run, or from random weights of the size of small."""
    files = {split: split_file(bench.tasks / task, split) for split in ("train", "validation", "test")}
    if None in files.values():
        return None
    values = {f"data.{split}": path for split, path in files.items()} | TASKS[task] | {"seeds": bench.options.seeds}
    values |= {
        "optimizer.lr": LEARNING_RATES.get(start, LEARNING_RATE),
        "keep_last": 1,
        "keep_best": 0,
        "use_best": "false",
    }
    # The last weights count: checkpoints of many runs side by side would wait for the disk.
    values |= {"dropout": 0.1, "save_every": 10**6}
    values |= {"predict_batch": 256} if GPU else {}
    if start == "random":
        # A folder with a configuration gives the random model its form.
        formed = [bench.folder(name) / "model" for name in ("small", "clock_fat5")]
        form = next((folder for folder in formed if (folder / "config.json").is_file()), bench.shards[0] / "tokenizer")
        values |= {"model": "none", "tokenizer": form, "preset": bench.options.preset}
    else:
        values["model"] = bench.model(start)
    if bench.tiny:
        values |= TINY_TASK if TASKS[task]["task"] == "text-to-text" else {**TINY_TASK, "max_new_tokens": "null"}
    facts = {"section": "finetune", "task": task, "start": start, "lr": values["optimizer.lr"]}
    environment = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"} if GPU else {}
    return Job(f"{task}-from-{start}", facts, [*FAT5, "finetune", *keys(values)], environment=environment)


def ablation(bench: Bench, kind: str, variant: str, seed: int, more: dict[str, Any]) -> Job:
    """One run of an ablation; kind `default` is the run that all of them are compared with."""
    steps = bench.options.ablation_steps
    shapes = {} if bench.tiny or not GPU else {"data.encoder_tokens": 8192, "data.num_workers": 2}
    shapes |= {"data.packs_per_step": 1, "data.packs_per_micro_batch": 1, "schedule.name": "cosine"}
    length = {"steps": steps, "eval_every": max(1, steps // 10), "save_every": 10**6, "log_every": 100}
    length |= {"schedule.warmup_steps": max(1, steps // 15)}
    words = pretraining(bench, "fat5-demo", **{**shapes, **length, "seed": seed, **more})
    facts = {"section": "ablations", "kind": kind, "variant": variant, "seed": seed, "preset": "fat5-demo"}
    environment = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"} if GPU else {}
    command = [*FAT5, "pretrain", *words]
    if kind == "padding":
        command = [*stock(), "--text", "stream", *words]
    name = f"{kind}-{variant}-seed{seed}" if kind != "default" else f"default-seed{seed}"
    after = (lambda folder, kept: scored(bench, folder, kept)) if kind in ("mixtures", "default") else None
    return Job(name, facts, command, environment=environment, **({"after": after} if after else {}))


def scored(bench: Bench, folder: Path, kept: Path) -> list[list[str]]:
    """The commands that score a model of any mixture under the denoisers of two."""
    tokens = {"eval_tokens": 512} if bench.tiny else {}
    return [
        [*FAT5, "evaluate", *keys({"model": folder, "mixture": one, "output": kept / f"scores-{one}.json", **tokens})]
        for one in ("fat5", "t5")
    ]


def variants(kinds: tuple[str, ...]) -> list[tuple[str, str, dict[str, Any]]]:
    """Kind, variant and keys of every run of some ablations."""
    found: list[tuple[str, str, dict[str, Any]]] = [("default", "default", {})]
    if "positions" in kinds:
        found += [("positions", name, {"model.position_encoding": name}) for name in POSITIONS]
    if "mixtures" in kinds:
        found += [("mixtures", name, {"data.mixture": name}) for name in MIXTURES]
    if "optimizers" in kinds:
        there = [name for name in OPTIMIZERS if name != "lamb" or importlib.util.find_spec("pytorch_optimizer")]
        found += [("optimizers", name, {"optimizer.name": name, "optimizer.lr": "null"}) for name in there]
    if "padding" in kinds:
        found.append(("padding", "padded", {}))
    return found


def ablate(*kinds: str) -> Callable[[Bench], None]:
    """A section: seed after seed, so that a cut leaves every variant with the same seeds."""

    def section(bench: Bench) -> None:
        jobs = [
            ablation(bench, kind, variant, seed, more)
            for seed in range(bench.options.seeds)
            for kind, variant, more in variants(kinds)
        ]
        bench.run_together(jobs, bench.options.at_once)
        if "mixtures" in kinds and bench.left() > 0:
            names = {"fat5-anywhere": "default-seed0"} | {name: f"mixtures-{name}-seed0" for name in MIXTURES}
            starts = [name for name in names.values() if bench.model(name) is not None]
            tuned = [job for name in starts if (job := tuning(bench, TASK_OF_MIXTURES, name))]
            bench.run_together(tuned, bench.options.at_once)

    return section


CLOCK = {"clock_fat5": "packed", "clock_stock": "documents", "clock_joined": "joined"}
"""Run of the clock → how its texts become batches."""
SECTIONS: dict[str, Callable[[Bench], None]] = {
    "rehearsal": rehearsal,
    "small": small,
    "base": base,
    "clock": clock,
    **{name: lambda bench, name=name: on_the_clock(bench, name) for name in CLOCK},  # type: ignore[misc]
    "finetune": finetune,
    "ablations": ablate(*KINDS),
    **{kind: ablate(kind) for kind in KINDS},
}

if __name__ == "__main__":
    main()
