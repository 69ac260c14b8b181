"""Makes a checkpoint of format 0 out of one of today: that of before the manifest had a hash of its own.

python tests/made_format_0.py RUN/checkpoints/step-N
"""

import json
import sys
from pathlib import Path


def main() -> None:
    path = Path(sys.argv[1], "manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key != "sha256"} | {"version": 0}))


if __name__ == "__main__":
    main()
