"""The page of reliability: every test that its table names exists, rows of other sections stay, a position is real."""

import argparse
import csv
import re
import sys
from pathlib import Path

import pytest

from made_run import command, events, last_checkpoint, prepared, rows_without_times, tiny

ROOT = Path(__file__).parents[2]
for folder in ("benchmarks", "scripts"):
    sys.path.insert(0, str(ROOT / folder))

import measure  # noqa: E402
import reliability  # noqa: E402
from fault_table import FAULTS, fault_table  # noqa: E402

__all__ = ["prepared"]


def test_every_test_of_the_table_exists():
    assert len(FAULTS) == 20
    for test in (test for fault in FAULTS for test in fault.tests):
        file, _, name = test.partition("::")
        path = ROOT / (file if "/" in file else f"tests/faults/{file}")
        assert re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE), test


def test_every_row_has_a_quick_test():
    for fault in FAULTS:
        quick = 0
        for test in fault.tests:
            file, _, name = test.partition("::")
            text = (ROOT / (file if "/" in file else f"tests/faults/{file}")).read_text()
            marks = text[: text.index(f"def {name}(")].rpartition("\n\n\n")[2]
            quick += not re.search(r"^@pytest\.mark\.(slow|gpu)$", marks, re.MULTILINE)
        assert quick, fault.what


def test_figures_stand_in_the_table():
    made = fault_table({"SIGKILL at a random step: kills": "20"})
    assert "20 kills in (not measured yet) runs" in made
    assert "{" not in made


def test_rows_of_other_sections_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(reliability, "ROOT", tmp_path)
    reliability.write([reliability.count("a", "kills", 1), reliability.count("b", "kills", 2)])
    reliability.write([reliability.count("a", "kills", 3)])
    with (tmp_path / "reliability.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["p50"]) for row in rows] == [("b", "2.0"), ("a", "3.0")]


@pytest.mark.slow
def test_a_position_further_on_is_one_that_a_run_continues_from(prepared, tmp_path):
    options = argparse.Namespace(folder=tmp_path, prepared=prepared, repeats=1)
    rows = {(row["case"], row["metric"]): row["p50"] for row in reliability.restart(options, ["10^5"])}
    assert rows["10^5 tokens behind", "first step has the examples that follow"] == 1
    at = int(rows["10^5 tokens behind", "steps behind"])
    assert last_checkpoint(tmp_path / "10^5").name == f"step-{at}"
    config = tiny(prepared, tmp_path / "10^5", steps=at + 2, save_every=100, **reliability.RESTART)
    code, error = command(config)
    assert code == 0, error
    assert events(tmp_path / "10^5")[-2]["checkpoint"] == f"step-{at}"
    steps = [row["step"] for row in rows_without_times(tmp_path / "10^5") if row["kind"] == "train"]
    assert steps == list(range(1, at + 3))
