"""benchmarks/gpu_ddp.py at a size for two processes on the CPU, and on shards as gpu_shards.py makes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_section(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])}
    shards = [sys.executable, str(ROOT / "benchmarks" / "gpu_shards.py"), str(tmp_path / "shards")]
    subprocess.run([*shards, "--vocab_size", "1024"], env=environment, check=True)
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_ddp.py"), str(tmp_path / "shards"), "--tiny"]
    command += ["--sections", "scaling", "same", "kill", "elastic", "--parallel", "ddp", "fsdp"]
    command += ["--steps", "40", "--output_dir", str(tmp_path), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for parallel in ("ddp", "fsdp"):
        assert f"kill, {parallel}, killed parts of the state equal: 4 of 4" in done.stdout
        assert f"elastic, {parallel}, moved examples and their order equal: 1" in done.stdout
    assert "times the tokens/s of one card" in (tmp_path / "ddp.csv").read_text()
