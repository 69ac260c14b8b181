"""The commands in the pages of this room, run as they are written."""

import re
import subprocess
from pathlib import Path

import pytest

from made_shell import fat5_on_path

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["tokenizer", "prepare"])
def test_every_command_runs(tmp_path: Path, page: str) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    script = "set -eu\n" + "\n".join(blocks)
    with fat5_on_path() as environment:
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("page", ["tokenizer", "prepare"])
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (DOCS / f"{page}.md").read_text(encoding="utf-8")):
        assert (DOCS / link).exists(), link
