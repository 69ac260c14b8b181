"""The pinned set: what the published torch asks for, read out of its wheel's metadata, and what is pinned beside it."""

import json
import subprocess
import sys
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}
PUBLISHED = {"2.13.0": 'triton==3.7.1; platform_system == "Linux" and python_version < "3.15"'}
"""What the wheels of torch on PyPI say of triton (METADATA, Requires-Dist); the index confirms it below."""


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def unmet(requirements: list[str], pins: dict[str, str]) -> list[str]:
    """Those that apply on Linux and that the pins do not meet."""
    asked = [Requirement(text) for text in requirements]
    apply = [one for one in asked if one.marker is None or one.marker.evaluate(LINUX)]
    return [str(one) for one in apply if not one.specifier.contains(pins.get(canonicalize_name(one.name), "0"))]


@cache
def published_metadata() -> dict[str, Any]:
    """Metadata of the torch that pip finds for another Python on Linux; nothing is installed, nor the wheel fetched."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps"]
    command += ["--report", "-", "--only-binary", ":all:", "--target", "unused", "--retries", "0", "--timeout", "30"]
    command += ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.12", f"torch=={pinned()['torch']}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["pip said nothing"]
        pytest.skip(f"waits for a package index that answers ({said[-1]})")
    metadata: dict[str, Any] = json.loads(done.stdout)["install"][0]["metadata"]
    if "+" in metadata["version"]:
        pytest.skip(f"waits for an index with the published torch; this one serves {metadata['version']}")
    return metadata


def test_triton_is_the_one_that_the_published_torch_names() -> None:
    pins = pinned()
    assert unmet([PUBLISHED[pins["torch"]]], pins) == []
    assert unmet([PUBLISHED[pins["torch"]]], pins | {"triton": "3.9.0"}) != [], "what stood here before"


@pytest.mark.slow
def test_the_index_confirms_it() -> None:
    requirements = published_metadata()["requires_dist"]
    assert PUBLISHED[pinned()["torch"]] in requirements
    known = [text for text in requirements if canonicalize_name(Requirement(text).name) in pinned()]
    assert len(known) >= 5
    assert unmet(known, pinned()) == []


def test_the_pins_meet_each_other() -> None:
    """What each installed package of the set asks of another one of it, as `pip check` would say."""
    pins = pinned()
    broken = {}
    for distribution in distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if pins.get(name) == distribution.version.split("+")[0]:
            among = [text for text in distribution.requires or [] if canonicalize_name(Requirement(text).name) in pins]
            broken[name] = unmet(among, pins)
    assert {name: faults for name, faults in broken.items() if faults} == {}
    assert len(broken) > 50


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone, and refuses the second."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
