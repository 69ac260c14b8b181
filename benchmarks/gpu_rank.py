"""`fat5` as torchrun starts it, leaving the most memory that this process took on its card: MEMORY/rank-N.json."""

import json
import os
import sys
from pathlib import Path

import torch

from fat5.cli.main import main

code = main(sys.argv[1:])
gpu = torch.cuda.is_available()
most = {
    "allocated": torch.cuda.max_memory_allocated() if gpu else 0,
    "reserved": torch.cuda.max_memory_reserved() if gpu else 0,
}
Path(os.environ["MEMORY"], f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(most))
sys.exit(code)
