"""The sample corpus as examples of tasks."""

import pytest

from fat5.errors import DataError
from fat5.tasks.finetune.table import read_table


def test_translations_of_each_other():
    table = read_table(["sample:fr-en"], "train")
    assert len(table) == 1923
    assert list(table.rows[0]) == ["id", "chapter", "fr", "en"]
    assert table.rows[0]["fr"].startswith("Ce chapitre est l'occasion")
    assert table.rows[0]["en"].startswith("This chapter revisits")
    assert table.where(1) == "sample:fr-en, row 2"


def test_one_language_and_three():
    assert list(read_table(["sample:de"], "train", limit=2).rows[0]) == ["id", "chapter", "text"]
    three = read_table(["sample:fr-en-de"], "train")
    assert {"fr", "en", "de"} <= three.rows[0].keys()
    assert len(three) <= 1923


def test_an_unknown_language():
    with pytest.raises(DataError, match="no sample corpus in 'xx'"):
        read_table(["sample:fr-xx"], "train")
