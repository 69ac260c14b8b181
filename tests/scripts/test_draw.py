"""The drawings of the pages: what scripts/draw.py draws today, well formed, and shown by a page."""

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("draw", ROOT / "scripts/draw.py")
assert spec is not None
assert spec.loader is not None
draw = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw)


HALF_A_POINT = 0.005 + 1e-9
"""As the page rounds."""


@pytest.mark.parametrize("name", draw.PICTURES)
def test_a_drawing_is_what_the_code_computes(name: str) -> None:
    made = draw.PICTURES[name]().svg()
    assert made == (ROOT / "docs/images" / name).read_text(encoding="utf-8"), "run python scripts/draw.py"
    root = ElementTree.fromstring(made)
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")]
    assert any(re.search(rf"!\[[^\]]+\]\(images/{name}\)", page) for page in pages)


def test_each_colour_has_a_light_and_a_dark_value() -> None:
    light, dark = draw.STYLE.split("@media(prefers-color-scheme:dark)")
    used = set(re.findall(r'class="(\w)"', "".join(one().svg() for one in draw.PICTURES.values())))
    for kind in used - {"t"}:  # in the colour of all text
        assert re.search(rf"\.{kind}{{[^}}]*(fill|stroke):#", light)
        assert re.search(rf"\.{kind}{{[^}}]*(fill|stroke):#", dark)


@pytest.mark.parametrize(("length", "share"), [(512, 0.63), (2048, 0.18), (8192, 0.05)])
def test_the_shares_of_near_tiles_that_the_page_gives(length: int, share: float) -> None:
    tiles = range(length // 128)
    near = sum(max(0, (abs(row - column) - 1) * 128 + 1) < 91 for row in tiles for column in tiles)
    assert near / len(tiles) ** 2 == pytest.approx(share, abs=HALF_A_POINT)
    assert f"{share:.0%}" in (ROOT / "docs/attention.md").read_text(encoding="utf-8")
