"""scripts/stock_suites.py on a made-up suite: the exchange of classes, the counts, the reasons, errors in one line."""

import csv
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "stock_suites.py"
# Knows the ways apart; stands where transformers' sources have their common suite.
SUITE = """
import torch

def ids_tensor(shape, vocab_size):
    return torch.randint(0, vocab_size, shape)

class ModelTesterMixin:
    def made(self):
        config, batch = self.model_tester.prepare_config_and_inputs_for_common()
        return [cls(config) for cls in self.all_model_classes], batch

    def test_forward(self):
        for model in self.made()[0]:
            assert model.eval()(**self.made()[1])[0].isfinite().all()

    def test_no_class_is_of_fat5(self):
        for model in self.made()[0]:
            assert "fat5" not in type(model).__mro__[1].__module__, "made of FAT5"

    def test_no_part_is_accelerated(self):
        for model in self.made()[0]:
            assert not any("accelerated" in type(module).__module__ for module in model.modules()), "a | part"

    def test_attention_is_sdpa(self):
        for model in self.made()[0]:
            assert model.config._attn_implementation == "sdpa"

    def test_needs_a_gpu(self):
        self.skipTest("no GPU")

    def test_inputs_embeds(self):
        pass
"""
FAILING = {
    "stock": set(),
    "fat5": {"test_no_class_is_of_fat5"},
    "accelerate": {"test_no_part_is_accelerated"},
    "attention": {"test_attention_is_sdpa"},
}


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_every_way_is_beside_stock(tmp_path, monkeypatch, capsys, script):
    tests = tmp_path / "sources" / "tests"
    tests.mkdir(parents=True)
    (tests / "test_modeling_common.py").write_text(SUITE)
    (tmp_path / "parameterized.py").touch()  # asked for, and here not needed
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    output = tmp_path / "out"
    command = [str(tmp_path / "sources"), "--output", str(output), "--families", "UMT5", "--python", sys.executable]
    assert script["main"](command) == 0
    found: dict[str, set[str]] = {way: set() for way in FAILING}
    with (output / "suites.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["outcome"] == "failed":
            found[row["way"]].add(row["test"].partition(".")[2])
    assert found == FAILING
    assert {row["test"].partition(".")[0] for row in rows} == {"UMT5ModelTest", "UMT5EncoderTest"}
    table = (output / "suites.md").read_text()
    assert table == capsys.readouterr().out.removesuffix("\n")
    assert "| stock | 10 | 0 | 2 | 10 | 0 | 0 |" in table
    assert "| fat5 | 8 | 2 | 2 | 8 | 2 | 0 |" in table
    assert "| accelerate | UMT5ModelTest.test_no_part_is_accelerated | failed | AssertionError: a / part" in table
    assert not list(tests.glob("*subjects*"))  # the sources are left as they were


def test_of_subtests_the_worst_counts(tmp_path, script):
    path = tmp_path / "found.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="tests.a.A" name="t"><failure message="one&#10;two"/></testcase>'
        '<testcase classname="tests.a.A" name="t"/><testcase classname="tests.a.A" name="u"><skipped message="no"/>'
        '</testcase><testcase classname="tests.a.A" name="u"/></testsuite></testsuites>'
    )
    assert script["read_outcomes"](path) == {"A.t": ("failed", "one"), "A.u": ("passed", "")}


def test_a_test_that_did_not_run_is_missing(script):
    outcomes = {"stock": {"A.t": ("passed", ""), "A.u": ("passed", "")}, "fat5": {"A.t": ("passed", "")}}
    assert "| fat5 | A.u | missing |  |" in script["report"](outcomes)


def test_errors_are_one_line(tmp_path, monkeypatch, capsys, script):
    assert script["main"]([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"stock_suites: {tmp_path}: no tests/test_modeling_common.py; give the sources of transformers\n"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_modeling_common.py").write_text("raise RuntimeError('broken')")
    (tmp_path / "parameterized.py").write_text("raise ImportError('No module named parameterized')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert script["main"]([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No module named parameterized; install it there" in error


@pytest.mark.slow
def test_a_suite_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, capsys, script):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_modeling_common.py").write_text("raise RuntimeError('broken')")
    (tmp_path / "parameterized.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert script["main"]([str(tmp_path), "--ways", "stock"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pytest ended with exit code" in error


def test_help_says_what_it_is(capsys, script):
    with pytest.raises(SystemExit):
        script["main"](["--help"])
    assert "transformers' own suites" in capsys.readouterr().out
