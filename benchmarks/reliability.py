"""How reliable is a run? Faults are injected into the command in processes of its own, and counted; saves, stops and
restarts are timed.

    python benchmarks/reliability.py --sections kills saves damage signals       (counts: any machine, busy or not)
    python benchmarks/reliability.py --sections stall stop restart ranks         (times: a quiet machine)

Rows of sections that do not run stay as they are in the published file. The faults are those of tests/injected.py, the
run that of tests/made_run.py: width 32, two stacks of one layer, dropout, 300 French paragraphs.
"""

import argparse
import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import measure

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from test_kill_in_save import POINTS  # noqa: E402
from test_table_state import FILES  # noqa: E402

from fat5.errors import CheckpointError  # noqa: E402
from fat5.files import file_sha256, is_leftover  # noqa: E402
from fat5.optim import ScheduleConfig  # noqa: E402
from fat5.tasks import PretrainConfig, Pretraining  # noqa: E402
from fat5.tasks.sizes import settle  # noqa: E402
from fat5.train import World, read_rows, verify_checkpoint  # noqa: E402
from fat5.train.checkpoint.files import _self_sha256  # noqa: E402
from made_ranks import pid_of_rank, torchrun  # noqa: E402
from made_run import (  # noqa: E402
    assert_same_run,
    command,
    cut,
    flip,
    fork,
    last_checkpoint,
    prepare_sample,
    remove,
    rows_without_times,
    start,
    tiny,
    wait_for_step,
)

ENDLESS = {"steps": 1_000_000, "save_every": 1_000_000, "eval_every": 1_000_000}
BEHIND = {"10^5": 10**5, "10^7": 10**7, "10^9": 10**9}  # tokens of text behind a restart
SHAPES = {"max_tokens": 256, "encoder_tokens": 1024, "decoder_tokens": 768}
SHAPES |= {"packs_per_step": 16, "packs_per_micro_batch": 16}
RESTART = {"data": SHAPES, "schedule": ScheduleConfig(name="constant", warmup_steps=0), "eval_every": 10**9}
SEED = 20
Rows = Iterator[dict[str, object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signals", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=7, help="of each time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        options.prepared = prepare_sample(options.folder)
        for name in options.sections:
            write(list(SECTIONS[name](options)))


def kills(options: argparse.Namespace) -> Rows:
    """Five SIGKILLs a run, at random steps and moments; each run is compared with one that was not killed."""
    settings = {"steps": 120, "save_every": 5, "eval_every": 20, "data": {"num_workers": 2}}
    settings["overrides"] = {"attention_dropout_rate": 0.1}
    clean = options.folder / "clean"
    done(tiny(options.prepared, clean, **settings))
    generator, equal, runs = random.Random(SEED), 0, options.kills // 5
    for turn in range(runs):
        run = options.folder / f"killed-{turn}"
        config = tiny(options.prepared, run, **settings)
        for _ in range(5):
            reached = max((row["step"] for row in rows_without_times(run)), default=0) if run.exists() else 0
            process = fork(config)
            wait_for_step(run, reached + generator.randint(1, 13))
            time.sleep(generator.uniform(0.0, 0.2))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        done(config)
        equal += is_same(clean, run)
    yield count("SIGKILL at a random step", "kills", 5 * runs)
    yield count("SIGKILL at a random step", "runs", runs)
    yield count("SIGKILL at a random step", "runs equal bit for bit", equal)


def saves(options: argparse.Namespace) -> Rows:
    """SIGKILL at each point of a save."""
    settings = {"save_every": 2, "keep_last": 1, "keep_best": 0}
    clean = options.folder / "saves"
    done(tiny(options.prepared, clean, **settings))
    sound = equal = 0
    for point in POINTS:
        run = options.folder / point.replace(" ", "-")
        config = tiny(options.prepared, run, **settings)
        passes = 2 if point.endswith("removing") else 3
        code, error = command(config, fault={"kill_in_save": {"point": point, "passes": passes}})
        if code != -signal.SIGKILL:
            raise SystemExit(f"not killed {point}: {error}")
        sound += all(is_sound(folder) for folder in (run / "checkpoints").glob("step-*"))
        done(config)
        equal += is_same(clean, run) and not leftovers(run)
    yield count("SIGKILL inside a save", "kills", len(POINTS))
    yield count("SIGKILL inside a save", "all checkpoints sound", sound)
    yield count("SIGKILL inside a save", "runs equal bit for bit", equal)


def damage(options: argparse.Namespace) -> Rows:
    """Every file of a checkpoint and of a shard flipped, cut and removed; bits flipped anywhere in a checkpoint."""
    run = options.folder / "damaged"
    config = tiny(options.prepared, run)
    done(config)
    checkpoint, found, generator = last_checkpoint(run), 0, random.Random(SEED)
    for act, name in itertools.product((flip, cut, remove), FILES):
        with restored(checkpoint / name):
            act(checkpoint / name)
            code, error = command(config, "--strict")
            found += code == 2 and f"{checkpoint.name}/{name}: " in error
    yield count("damaged checkpoint", "files flipped, cut or removed", 3 * len(FILES))
    yield count("damaged checkpoint", "refused by name", found)
    flips, found = 2000, 0
    for _ in range(flips):
        path = checkpoint / generator.choice(FILES)
        with restored(path):
            content = bytearray(path.read_bytes())
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            path.write_bytes(content)
            found += not is_sound(checkpoint)
    yield count("damaged checkpoint", "single bits flipped", flips)
    yield count("damaged checkpoint", "bits found by verification", found)
    data, found, total = options.folder / "damaged-data", 0, 0
    shutil.copytree(options.prepared, data)
    shards = [path for path in sorted(data.glob("*/*.ds*")) if not path.parent.name.startswith(".")]
    for act, path in itertools.product((flip, cut, remove), shards):
        shutil.rmtree(data / ".verified", ignore_errors=True)
        with restored(path):
            act(path)
            code, error = command(tiny(data, options.folder / "unread"))
            total, found = total + 1, found + (code == 2 and f"{path.parent.name}/{path.name}: " in error)
    yield count("damaged shard", "files flipped, cut or removed", total)
    yield count("damaged shard", "refused by name", found)


def signals(options: argparse.Namespace) -> Rows:
    """SIGTERM at random moments, from the start of the process to its end; one in five pays for its imports."""
    settings = {"steps": 150, "save_every": 50, "eval_every": 75}
    clean, whole = options.folder / "signalled", {}
    for begin in (start, fork):
        shutil.rmtree(clean, ignore_errors=True)
        began = time.perf_counter()
        begin(tiny(options.prepared, clean, **settings)).communicate(timeout=600)
        whole[begin] = time.perf_counter() - began
    generator, kinds, right = random.Random(SEED), {"saved": 0, "before or after the steps": 0, "over": 0}, 0
    for turn in range(options.signals):
        run = options.folder / f"signal-{turn}"
        config = tiny(options.prepared, run, **settings)
        begin = start if turn % 5 == 0 else fork
        process = begin(config)
        try:
            _, error = process.communicate(timeout=generator.uniform(0.0, 1.1 * whole[begin]))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            _, error = process.communicate(timeout=120)
        saved = process.returncode == 128 + signal.SIGTERM
        kind = "saved" if saved else "over" if process.returncode == 0 else "before or after the steps"
        kinds[kind] += 1
        good = process.returncode in (0, 128 + signal.SIGTERM, -signal.SIGTERM) and "Traceback" not in error
        if saved:
            step = verify_checkpoint(last_checkpoint(run))["step"]
            good &= f"stopped by SIGTERM after step {step}; the same command continues" in error
        good &= all(is_sound(folder) for folder in (run / "checkpoints").glob("step-*"))
        done(config)
        good &= is_same(clean, run) and not leftovers(run)
        if not good:
            print(f"turn {turn}, {kind}, exit code {process.returncode}: {error[-2000:]}", flush=True)
        right += good
    yield count("SIGTERM at a random moment", "signals", options.signals)
    yield from (count("SIGTERM at a random moment", kind, number) for kind, number in kinds.items())
    yield count("SIGTERM at a random moment", "ended and continued as documented", right)


def stall(options: argparse.Namespace) -> Rows:
    """What stands between two steps with a save and without one, from metrics.jsonl."""
    for preset, steps, every in (("fat5-demo", 60, 5), ("fat5-small", 25, 4)):
        run = options.folder / preset
        config = tiny(options.prepared, run, steps=steps, save_every=every, eval_every=steps)
        config.model.preset, config.model.overrides = preset, {}
        done(config, seconds=1800)
        rows = [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"]
        took = [row["step_tokens"] / row["tokens_per_second"] for row in rows]
        gaps = {row["step"]: rows[i + 1]["seconds"] - row["seconds"] - took[i + 1] for i, row in enumerate(rows[:-1])}
        at = np.array([1e3 * gap for step, gap in gaps.items() if step % every == 0])
        between = np.array([1e3 * gap for step, gap in gaps.items() if step % every])
        size = sum(path.stat().st_size for path in last_checkpoint(run).iterdir())
        yield measure.row(f"save of {preset}", "fat5 pretrain", "step held up by a save", at, "ms")
        yield measure.row(f"save of {preset}", "fat5 pretrain", "the same without a save", between, "ms")
        yield measure.row(f"save of {preset}", "fat5 pretrain", "step", 1e3 * np.array(took[1:]), "ms")
        yield measure.row(f"save of {preset}", "fat5 pretrain", "checkpoint", np.array([size]), "bytes")


def stop(options: argparse.Namespace) -> Rows:
    """From SIGTERM to the end of the process."""
    for preset in ("width 32", "fat5-demo"):
        taken = []
        for turn in range(options.repeats):
            run = options.folder / f"stop-{preset.replace(' ', '-')}-{turn}"
            config = tiny(options.prepared, run, data={"num_workers": 2}, **ENDLESS)
            if preset != "width 32":
                config.model.preset, config.model.overrides = preset, {}
            process = start(config)
            wait_for_step(run, 5)
            began = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)
            taken.append(time.perf_counter() - began)
            if process.returncode != 128 + signal.SIGTERM:
                raise SystemExit(f"exit code {process.returncode}")
        yield measure.row(f"stop of {preset}", "fat5 pretrain", "SIGTERM to exit", np.array(taken), "s")


def restart(options: argparse.Namespace, names: Sequence[str] = tuple(BEHIND)) -> Rows:
    """From the start of the command to its first step, by the tokens of text behind its checkpoint."""
    base = options.folder / "base"
    done(tiny(options.prepared, base, steps=2, **RESTART))
    behind, taken = {}, {}
    for name in names:
        behind[name] = options.folder / name
        shutil.copytree(base, behind[name])
        config = tiny(options.prepared, behind[name], steps=2, **RESTART)
        moved, same = move_on(config, last_checkpoint(behind[name]), BEHIND[name])
        yield count(f"{name} tokens behind", "steps behind", moved)
        yield count(f"{name} tokens behind", "first step has the examples that follow", same)
    for turn, name in itertools.product(range(options.repeats), behind):
        run = options.folder / f"{name}-{turn}"
        shutil.copytree(behind[name], run)
        at = verify_checkpoint(last_checkpoint(run))["step"]
        config = tiny(options.prepared, run, **RESTART, steps=at + 2)
        began = time.perf_counter()
        process = start(config)
        log = run / "metrics.jsonl"
        while not any(row["step"] > at for row in tail(log)):
            if process.poll() is not None:
                raise SystemExit(process.communicate()[1])
            time.sleep(0.01)
        taken.setdefault(name, []).append(time.perf_counter() - began)
        process.communicate(timeout=120)
        shutil.rmtree(run)
    for name, seconds in taken.items():
        yield measure.row(f"{name} tokens behind", "fat5 pretrain", "restart to first step", np.array(seconds), "s")


def move_on(config: PretrainConfig, checkpoint: Path, tokens: int) -> tuple[int, bool]:
    """Puts a checkpoint so many tokens of text further on, its log too; returns its step, and whether the loader that
    continues there gives the examples that follow. Every pack on the way is made, from lengths alone.
    """
    world = World(torch.device("cpu"))
    loader = Pretraining.open(settle(config, world), world).loader
    examples, raw = loader.examples(), 0
    for part, after in examples:
        raw += int(part.length.sum())
        if after is not None and raw >= tokens:
            state = after
            break
    follow = [next(examples)[0].piece.tolist() for _ in range(4)]
    loader.load_state_dict(state | {"micro_batch": 0})
    same = [part.piece.tolist() for part, _ in itertools.islice(loader.examples(), 4)] == follow
    content = json.loads((checkpoint / "trainer.json").read_text())
    content["data"] = state | {"micro_batch": 0}
    content["progress"] |= {"step": state["step"], "raw_tokens": raw, "evaluated_at": state["step"]}
    target = checkpoint.with_name(f"step-{state['step']}")
    checkpoint.rename(target)
    (target / "trainer.json").write_text(json.dumps(content))
    manifest = json.loads((target / "manifest.json").read_text()) | {"step": state["step"]}
    path = target / "trainer.json"
    manifest["files"]["trainer.json"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (target / "manifest.json").write_text(json.dumps(manifest | {"sha256": _self_sha256(manifest)}))
    log = target.parent.parent / "metrics.jsonl"
    row = read_rows(log)[-2]
    with log.open("a") as file:
        file.writelines(json.dumps(row | {"step": step}) + "\n" for step in range(3, state["step"] + 1))
    return state["step"], same


def ranks(options: argparse.Namespace) -> Rows:
    """From SIGKILL of one of two ranks to the end of all processes of torchrun."""
    for victim in (0, 1):
        taken = []
        for turn in range(options.repeats):
            run = options.folder / f"ranks-{victim}-{turn}"
            recipe = run.with_suffix(".yaml")
            recipe.write_text(tiny(options.prepared, run, **ENDLESS).to_yaml())
            process = torchrun("pretrain", "--config", str(recipe))
            wait_for_step(run, 3)
            pids = [pid_of_rank(process.pid, rank) for rank in (0, 1)]
            began = time.perf_counter()
            os.kill(pids[victim], signal.SIGKILL)
            process.communicate(timeout=120)
            while any(Path(f"/proc/{pid}").exists() for pid in pids):
                time.sleep(0.01)
            taken.append(time.perf_counter() - began)
            if process.returncode == 0:
                raise SystemExit("torchrun ended with 0")
        yield measure.row(f"rank {victim} of 2 killed", "torchrun", "until all have ended", np.array(taken), "s")


SECTIONS: dict[str, Callable[[argparse.Namespace], Rows]] = {
    one.__name__: one for one in (kills, saves, damage, signals, stall, stop, restart, ranks)
}


def done(config: PretrainConfig, seconds: float = 600) -> None:
    """Runs the command to its end."""
    code, error = command(config, seconds=seconds)
    if code:
        raise SystemExit(f"{config.output_dir}: exit code {code}\n{error}")


def is_same(clean: Path, other: Path) -> bool:
    try:
        assert_same_run(clean, other)
    except AssertionError as difference:
        print(f"{other.name}: {str(difference)[:500]}", flush=True)
        return False
    return True


def is_sound(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except CheckpointError:
        return False
    return True


def leftovers(run: Path) -> list[str]:
    return [path.name for folder in (run, run / "checkpoints") for path in folder.iterdir() if is_leftover(path.name)]


@contextmanager
def restored(path: Path) -> Iterator[None]:
    """Gives a file back its content, and its times, on leaving."""
    content, status = path.read_bytes(), path.stat()
    yield
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def tail(log: Path) -> list[dict]:
    """The last rows of a log."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().split(b"\n")[1:-1]
    return [json.loads(line) for line in lines]


def count(case: str, metric: str, number: float) -> dict[str, object]:
    return measure.row(case, "fat5 pretrain", metric, np.array([float(number)]), "count")


def write(rows: list[dict[str, object]]) -> None:
    """Puts rows in the place of those of the same case and metric; the others stay, as they were measured."""
    path = measure.RESULTS / "reliability.csv"
    published = ROOT / "benchmarks" / "results" / path.name
    keys = {(row["case"], row["metric"]) for row in rows}
    kept = []
    if path.exists() or published.exists():
        with (path if path.exists() else published).open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if (row["case"], row["metric"]) not in keys]
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, measure.FIELDS)
        writer.writeheader()
        writer.writerows(kept)
    measure.append(path, rows)
    for row in rows:
        print(f"{row['case']!s:32} {row['metric']!s:40} {row['p50']:>12,} {row['unit']}", flush=True)


if __name__ == "__main__":
    main()
