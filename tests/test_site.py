"""The documentation's site: its navigation, its reference and its links, and the strict build where mkdocs is."""

import importlib.util
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import fat5
import fat5.data
import fat5.ops
import fat5.optim

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts/site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation_once(site: ModuleType) -> None:
    sections = site.navigation((ROOT / "docs/README.md").read_text(encoding="utf-8"))
    assert [name for section in sections for name in section] == ["Tutorials", "How to", "Reference", "Explanation"]
    pages = [page for section in sections for pages in section.values() for page in pages]
    written = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(pages) == sorted({*written, "decisions/README.md", *map(site.page_of, site.ROOMS)})


def test_the_reference_has_the_public_names(site: ModuleType) -> None:
    assert {"FAT5Config", "FAT5ForConditionalGeneration", "accelerate"} <= set(site.public_names("fat5"))
    assert set(site.public_names("fat5.ops")) == {name for name in fat5.ops.__all__ if not name.isupper()}
    for room in (fat5.data, fat5.optim):
        assert set(site.public_names(room.__name__)) == set(dir(room))
    assert "::: fat5.ops.attention\n" in site.reference("fat5.ops")


def test_links_that_leave_the_pages_lead_to_the_forge(site: ModuleType) -> None:
    text = "[a](../examples/README.md) [b](../src/fat5#x) [c](doctor.md) [d](decisions/README.md)"
    made = site.turn_links(text, "README.md", "https://forge/x")
    assert made == (
        "[a](https://forge/x/blob/main/examples/README.md) [b](https://forge/x/tree/main/src/fat5#x) [c](doctor.md) "
        "[d](decisions/README.md)"
    )
    inside = "[up](../doctor.md)"
    assert site.turn_links(inside, "decisions/README.md", "https://forge/x") == inside


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="waits for mkdocs, which `make docs` installs")
def test_it_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FAT5ForConditionalGeneration" in (tmp_path / "reference/fat5/index.html").read_text(encoding="utf-8")
