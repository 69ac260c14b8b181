"""What a release repeats in several files: the version, and the citation."""

import re
import tomllib
from pathlib import Path

import yaml

import fat5

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == fat5.__version__ == PROJECT["version"]


def test_the_changelog_begins_with_the_version_and_the_citation_has_its_date() -> None:
    """A version without a date is not released, and then has none in the citation either."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = re.search(r"^## (\d+\.\d+\.\d+) \((unreleased|\d{4}-\d\d-\d\d)\)$", changelog, re.MULTILINE)
    assert heading is not None
    assert heading[1] == fat5.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation.get("date-released", "unreleased")) == heading[2]


def test_the_citation_has_what_its_format_asks_for() -> None:
    """Required keys of CFF 1.2.0; a person has a family name, an entity a name."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] in PROJECT["license"]
    assert {"message", "title", "authors"} <= set(citation)
    for work in [citation, *citation["references"]]:
        assert work["type"] in ("software", "article", "conference-paper")
        assert work["title"]
        assert all({"name"} == set(one) or {"family-names", "given-names"} == set(one) for one in work["authors"])
