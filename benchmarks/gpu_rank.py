"""`fat5` as torchrun starts it, with notes of its process in NOTES/rank-N.json: the most memory that it took on a card;
with PROFILE=STEP also milliseconds a step, over three steps from that one on: NCCL's kernels, all kernels, the clock.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fat5.cli.main import main
from fat5.train.step import StepRunner

STEPS = 3
notes: dict[str, Any] = {}


def profile_steps(first: int) -> None:
    """Profiles STEPS steps from `first` on."""
    run, made = StepRunner.run, 0
    recorder = profile(activities=[ProfilerActivity.CUDA])

    def profiled(self: StepRunner, *given: Any) -> Any:
        nonlocal made
        made += 1
        if made == first:
            torch.cuda.synchronize()
            recorder.start()
            notes["started"] = time.perf_counter()
        result = run(self, *given)
        if made == first + STEPS - 1:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - notes.pop("started")
            recorder.stop()
            kernels = [event for event in recorder.events() if event.device_type == torch.autograd.DeviceType.CUDA]
            messages = sum(event.device_time for event in kernels if "nccl" in event.name.lower())
            notes["step"] = {
                "NCCL's kernels": messages / 1e3 / STEPS,
                "all kernels": sum(event.device_time for event in kernels) / 1e3 / STEPS,
                "clock": 1e3 * seconds / STEPS,
            }
        return result

    StepRunner.run = profiled  # type: ignore[method-assign]


gpu = torch.cuda.is_available()
if gpu and os.environ.get("PROFILE"):
    profile_steps(int(os.environ["PROFILE"]))
code = main(sys.argv[1:])
notes["allocated"] = torch.cuda.max_memory_allocated() if gpu else 0
notes["reserved"] = torch.cuda.max_memory_reserved() if gpu else 0
Path(os.environ["NOTES"], f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(notes))
sys.exit(code)
