"""The pictures of the GPU benchmarks, drawn from the files in the repository and from one whose figures are known."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_plots  # noqa: E402

HEADER = "case,provider,metric,p20,p50,p80,unit,repeats\n"


@pytest.mark.parametrize(
    ("name", "pictures"),
    [
        ("h200-attention", {"h200-attention.png", "h200-attention-other.png"}),
        ("h200-fused", {"h200-fused-roofline.png"}),
    ],
)
def test_committed_results_are_drawn(name: str, pictures: set[str], tmp_path: Path) -> None:
    made = gpu_plots.draw(ROOT / "benchmarks" / "results" / f"{name}.csv", tmp_path)
    assert {path.name for path in made} >= pictures
    for path in made:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_series_hold_the_figures_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    rows = [f"D64 L{length},fat5 bias,{stage},0,{rate},0,TFLOP/s,1" for stage, length, rate in (
        ("forward", 2048, 300), ("forward", 512, 100), ("backward", 512, 50))]  # fmt: skip
    rows += ["D64 L512,64x64x4x3,time,0,1,0,s,1", "packed D64,fat5 bias,forward,0,7,0,TFLOP/s,1"]
    rows += ["packed D64,fat5 bias,peak memory,0,7,0,GB,1"]
    file.write_text(HEADER + "\n".join(rows) + "\n")
    found = gpu_plots.read(file)
    forward, backward = gpu_plots._over_lengths(found, None).axes
    assert forward.lines[0].get_xydata().tolist() == [[512, 100], [2048, 300]]
    assert backward.lines[0].get_xydata().tolist() == [[512, 50]]
    assert [path.name for path in gpu_plots.draw(file, tmp_path)] == ["results.png", "results-other.png"]


def test_nothing_to_draw(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text(HEADER)
    assert gpu_plots.draw(file, tmp_path) == []
