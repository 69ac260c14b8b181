"""scripts/results.py: what the committed pages say, intervals, times to a loss, and a page of made runs."""

import json
import math
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import results  # noqa: E402
import results_parts  # noqa: E402
from results_files import Run, differ, interval, read_runs, time_to  # noqa: E402

FACTS: dict[str, Any] = {
    "machine": "H0",
    "versions": "v1",
    "commit": "abc",
    "date": "2026-11-29",
    "preset": "fat5-demo",
}
FACTS |= {"training_text": {"documents": 7, "tokens": 450}}


def write(folder: Path, name: str, losses: list[float], first: float = 5.0, **facts: Any) -> Path:
    """A run of 100 steps a second from `first` seconds on, with an evaluation every 100 steps."""
    run = folder / name
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"name": name, "complete": True, **FACTS, **facts}))
    rows: list[dict[str, Any]] = []
    for number, loss in enumerate(losses):
        step = 100 * number
        if number:
            train = {"kind": "train", "lr": 1, "grad_norm": 1, "tokens_per_second": 1e3, "mfu": 0.4, "step_tokens": 10}
            for at in (1, 100) if number == 1 else (step,):
                times = {"seconds": first + at / 100} | ({"trained": (at - 1) / 100} if first else {})
                rows.append({**train, "step": at, "loss": loss, "tokens": 10 * at, "raw_tokens": 9 * at, **times})
        parts = {"[R]": {"loss": loss, "accuracy": 0.5, "tokens": 5}}
        rows.append({"kind": "eval", "step": step, "loss": loss, "accuracy": 0.5, "tokens": 5, "by_denoiser": parts})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_seconds_begin_at_the_first_step_and_times_lie_between_evaluations(tmp_path: Path) -> None:
    run = Run.read(write(tmp_path, "clock_fat5", [7.0, 5.0, 3.0], first=60.0, section="clock", text="packed"))
    at, losses = run.curve()
    assert at.tolist() == pytest.approx([0, 0.99, 1.99])
    assert losses.tolist() == [7.0, 5.0, 3.0]
    assert time_to(run, 4.0) == pytest.approx(1.49)
    assert time_to(run, 7.0) == 0
    assert time_to(run, 2.9) is None


def test_intervals_are_those_of_t() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 4.30265 / math.sqrt(3)), rel=1e-5)
    assert math.isnan(interval([1.0])[1])
    assert differ([1.0, 1.1, 0.9], [1.05, 1.0, 1.1]) is False
    assert differ([1.0, 1.1, 0.9], [3.05, 3.0, 3.1]) is True
    assert differ([1.0], [2.0, 3.0]) is None


def test_a_page_of_made_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, taken, pictures = tmp_path / "given", tmp_path / "results", tmp_path / "images"
    small = write(given, "small", [7.0, 4.0], section="small")
    (small / "filled.jsonl").write_text(json.dumps({"prompt": "A ___ c|d.", "completion": "b", "text": ""}) + "\n")
    (small / "sentences.jsonl").write_text(json.dumps({"prompt": "A ___ c|d.", "original": "A x c|d."}) + "\n")
    (small / "events.jsonl").write_text(json.dumps({"event": "stopped", "step": 40, "signal": "SIGTERM"}) + "\n")
    (small / "log.txt").write_text("a long log")
    (small / "config.yaml").write_text("data:\n  mixture: fat5-anywhere\n")
    write(given, "clock_fat5", [7.0, 5.0, 3.0], section="clock", text="packed")
    write(given, "clock_stock", [7.0, 6.0, 5.0], first=0.0, section="clock", text="documents")
    write(given, "clock_joined", [7.0, 6.5, 6.0], first=0.0, section="clock", text="joined")
    for seed in range(3):
        facts = {"section": "ablations", "seed": seed}
        write(given, f"default-seed{seed}", [7.0, 5.0 + seed / 100], kind="default", variant="default", **facts)
        write(given, f"positions-none-seed{seed}", [7.0, 6.0 + seed / 100], kind="positions", variant="none", **facts)
        write(given, f"positions-rope-seed{seed}", [7.0, 5.01], kind="positions", variant="rope", **facts)
        write(given, f"mixtures-t5-seed{seed}", [7.0, 4.0], kind="mixtures", variant="t5", **facts)
    (given / "mixtures-t5-seed0" / "scores-t5.json").write_text('{"loss": 3.25}')
    for start, value in (("small", 0.9), ("random", 0.5)):
        run = write(given, f"module-from-{start}", [], section="finetune", task="module", start=start)
        for seed in range(3):
            (run / f"seed-{seed}").mkdir()
            metrics = {"accuracy": value, "macro_f1": value + seed / 100}
            found = {"metrics": {name: {"value": one} for name, one in metrics.items()}}
            found |= {"labels": ["a", "b"], "confusion": [[3, 1], [0, 2]]} if seed == 0 else {}
            (run / f"seed-{seed}" / "results.json").write_text(json.dumps(found))
    monkeypatch.setattr(results, "PICTURES", pictures)
    monkeypatch.setattr(results, "RESULTS", taken)
    empty = results.render(taken)
    assert empty.count(results_parts.NOT_RUN) == 10
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        archive.add(given, arcname=".")
    results.take_over(tmp_path / "all.tar.gz", taken / "french")
    assert not list(taken.rglob("log.txt"))
    assert len(read_runs(taken / "french")) == 18
    results.draw()
    assert {path.name for path in pictures.iterdir()} == {
        f"results-{name}.png" for name in ("pretraining", "clock", "positions", "module")
    }
    page = results.render(taken)
    for text in (
        "A **b** c\\|d.",
        "| denoisers | `fat5-anywhere` |",
        "Stopped by SIGTERM after step 40",
        "| validation loss, last | **4.000** |",
        "| [R] | 4.00 |",
        "| training text | 0.0M tokens in 7 documents, 2 passes |",
        "after 2 s) after 1 s: **2.0 times sooner**",
        "| t5 (default) | 5.010 ± 0.025 |  |",
        "| none | 6.010 ± 0.025 | worse |",
        "| rope | 5.010 ± 0.000 | within noise |",
        "| t5 | – | 3.250 (one seed) | – |",
        "| module | macro_f1 | **91.0 ± 2.5** | – | – | – | – | 51.0 ± 2.5 |",
        "- module, macro_f1, beside random weights: fat5-small better.",
        "images/results-module.png",
    ):
        assert text in page, text
    assert page.count("times sooner") == 1  # joined chunks are not scored on examples like their own
    assert results_parts.OTHER_EXAMPLES in page
    assert page.count(results_parts.NOT_RUN) == 4  # the text, the CPU, optimizers, padding


def test_the_committed_pages_come_from_the_committed_files() -> None:
    assert results.render() == results.PAGE.read_text(encoding="utf-8"), "run python scripts/results.py"
    page = results.PLAN.read_text(encoding="utf-8")
    assert results.with_plan(page) == page, "run python scripts/results.py"


def test_the_plan_comes_from_the_recipes_and_the_measured_rates() -> None:
    text = results.plan()
    base = next(line for line in text.splitlines() if line.startswith("| fat5-base"))
    assert "| 113B | 212 GB | 51 GB |" in base  # 500,000 steps of 8 packs of 28,160 tokens; 14 checkpoints of 3.66 GB
    assert "None of these runs has been made to its end" in text
