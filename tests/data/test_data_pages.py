"""The snippets of docs/ul2.md and docs/packing.md run as they stand."""

import re
from pathlib import Path

import pytest
import yaml

from fat5.data import BatchConfig, MixtureOfDenoisers
from fat5.data.tokenizer.json_file import byte_tokenizer
from fat5.data.tokenizer.loading import Tokenizer
from made_corpus import made_documents, write_corpus

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", ["ul2.md", "packing.md"])
def test_python_snippets_run(page, tmp_path, monkeypatch):
    tokenizer = Tokenizer(byte_tokenizer(), None, {})
    write_corpus(
        tmp_path / "shards", made_documents([200] * 200, vocab_size=tokenizer.info.vocab_size), info=tokenizer.info
    )
    tokenizer.save(tmp_path / "shards/tokenizer")
    monkeypatch.chdir(tmp_path)
    snippets = blocks(page, "python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), {})


def test_the_table_and_the_yaml_of_the_page_are_the_mixtures_they_say():
    row = r"^\| ([\d.]+) \| ([\d.]+) \| (\w+) \| (\[\w\]) \| ([\d.]+) \|$"
    rows = re.findall(row, (DOCS / "ul2.md").read_text(), re.MULTILINE)
    mixture = MixtureOfDenoisers.named("fat5")
    assert [(float(mu), float(r), spans, prefix) for mu, r, spans, prefix, _ in rows] == [
        (d.mu, d.r, str(d.max_spans), d.prefix) for d in mixture.denoisers
    ]
    assert [float(row[4]) for row in rows] == pytest.approx(mixture.proportions)
    (recipe,) = blocks("ul2.md", "yaml")
    assert len(MixtureOfDenoisers.of(yaml.safe_load(recipe)["mixture"])) == 2


def test_the_default_bound_on_examples_is_the_documented_one():
    assert BatchConfig(encoder_tokens=16384).examples_per_pack == 1024
