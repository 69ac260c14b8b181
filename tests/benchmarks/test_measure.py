"""A benchmark leaves tracked files alone; publishing its results is a step of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAVE = "import numpy, measure; measure.save('startup', [measure.row('fat5', 'fat5', 'time', numpy.ones(3), 's')])"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what benchmarks and pages touch."""
    for name in ("benchmarks", "scripts", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "README.fr.md", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_results_go_to_an_ignored_folder_until_they_are_published(checkout: Path) -> None:
    before = contents(checkout)
    subprocess.run([sys.executable, "-c", SAVE], cwd=checkout / "benchmarks", check=True)
    after = contents(checkout)
    assert after.keys() - before.keys() == {"bench/startup.csv"}
    assert all(after[name] == content for name, content in before.items())
    assert "/bench/" in (checkout / ".gitignore").read_text().splitlines()
    subprocess.run([sys.executable, "scripts/publish.py", "bench"], cwd=checkout, check=True)
    published = contents(checkout)
    changed = {name for name, content in after.items() if published[name] != content}
    assert "benchmarks/results/startup.csv" in changed
    assert changed <= {"benchmarks/results/startup.csv", "README.md", "README.fr.md", "docs/performance.md"}
