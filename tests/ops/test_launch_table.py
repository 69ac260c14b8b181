"""The launch table of a user's own GPU: written by tuning, read over the shipped one, ignored where it is damaged."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fat5.bench.tuning import write_table
from fat5.ops.attention.triton.configuration import KERNELS, read_table, table_row, tuned, user_table
from fat5.ops.attention.triton.launch_table import DEFAULTS, TUNED
from fat5.ops.triton.launch import Launch

KEY, ROW = ("forward", 90, 64, 2), (32, 64, 4, 2)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's table, in a folder that does not exist yet."""
    monkeypatch.setenv("FAT5_CACHE", str(tmp_path / "cache"))
    tuned.cache_clear()
    yield user_table()
    tuned.cache_clear()


def test_tuned_rows_replace_the_shipped_ones(table: Path) -> None:
    assert table_row(*KEY) == TUNED[KEY]
    tuned()[KEY] = ROW
    tuned()[("band", 80, 128, 4)] = (16, 16, 4, 1)
    write_table(table)
    tuned.cache_clear()
    assert read_table(table) == {KEY: ROW, ("band", 80, 128, 4): (16, 16, 4, 1)}
    assert table_row(*KEY) == Launch(*ROW)
    assert table_row("key_gradient", 90, 64, 2) == TUNED[("key_gradient", 90, 64, 2)]
    assert TUNED[KEY] != ROW


def test_every_shipped_row_can_be_kept(table: Path) -> None:
    tuned().update({(kernel, 75, width, size): row for (kernel, width, size), row in DEFAULTS.items()})
    write_table(table)
    assert len(read_table(table)) == len(DEFAULTS) == 4 * len(KERNELS)


@pytest.mark.parametrize("change", [
    {"kernel": "backward"}, {"kernel": ["forward"]}, {"architecture": "90"}, {"head_dim": 96}, {"element_size": 8},
    {"block_m": 48}, {"block_n": 256}, {"num_warps": 3}, {"num_warps": True}, {"num_stages": 0}, {"more": 1},
])  # fmt: skip
def test_a_row_that_is_none_is_a_damaged_table(table: Path, change: dict, caplog: pytest.LogCaptureFixture) -> None:
    row = dict(zip(("kernel", "architecture", "head_dim", "element_size", *Launch._fields), KEY + ROW))
    assert_ignored(table, json.dumps([row | change]), caplog)


@pytest.mark.parametrize("content", ["", "{}", "[1", "[[]]", "null", "[" * 100_000, b"\xff\xfe"])
def test_a_damaged_table_is_one_warning_and_the_shipped_rows(
    table: Path, content: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    assert_ignored(table, content, caplog)


def test_a_table_that_cannot_be_read(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    table.mkdir(parents=True)
    assert table_row(*KEY) == TUNED[KEY]
    assert "launch_table.json is ignored" in caplog.text


def assert_ignored(table: Path, content: str | bytes, caplog: pytest.LogCaptureFixture) -> None:
    table.parent.mkdir()
    table.write_bytes(content.encode() if isinstance(content, str) else content)
    assert table_row(*KEY) == TUNED[KEY]
    assert table_row("forward", 80, 64, 2) == DEFAULTS[("forward", 64, 2)]
    assert len(caplog.records) == 1
    assert "launch_table.json is ignored, the shipped launch table is used" in caplog.text
