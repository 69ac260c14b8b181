"""What benchmarks/prepare_scale.py does to gigabytes, here to a few megabytes: kills change no byte, memory is flat."""

import sys
from itertools import islice
from pathlib import Path

import pytest

from fat5.data.tokenizer.training import TokenizerTraining, train_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import prepare_scale as scale

MEGABYTES = 24
KILLS = 6
FLAT = 1.15
"""Peak over that of a third of the text; Python's memory allocator varies by a few per cent from run to run."""


def test_the_text_is_the_same_in_every_run() -> None:
    one, other = (list(islice(scale.documents(3), 20)) for _ in range(2))
    assert one == other
    assert max(map(len, one)) > 1_500_000
    assert len({len(text) for text in one}) > 15


@pytest.mark.slow
def test_kills_change_no_byte_and_memory_is_flat(tmp_path: Path) -> None:
    for name, part in (("third", 3), ("whole", 1)):
        scale.write_corpus(tmp_path / name, MEGABYTES * 1_000_000 // part)
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer(TokenizerTraining([str(tmp_path / "third")], str(tokenizer), vocab_size=2048, rows=300))
    small = scale.undisturbed(scale.command(tmp_path / "third", tokenizer, tmp_path / "small", 2))
    large = scale.undisturbed(scale.command(tmp_path / "whole", tokenizer, tmp_path / "clean", 2))
    words = scale.command(tmp_path / "whole", tokenizer, tmp_path / "killed", 2)
    _, kills = scale.with_kills(words, KILLS, 2.0)
    assert min(kills.values()) > 0, kills
    assert scale.differences(tmp_path / "clean", tmp_path / "killed")[0] == []
    assert large.process < FLAT * small.process
    assert large.together < FLAT * small.together
