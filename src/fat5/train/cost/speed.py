"""How fast several devices train, from what one of them has measured and from data sheets.

    step of one device     arithmetic + update
    step of N devices      arithmetic / N + update / shards + messages

`update` is what norm, clipping and optimizer read and write, at the speed of the device's memory; it is taken out of
the measured step. `messages`, with S shards and C = N / S copies:

    ddp     float32 gradients are copied into messages and back, and summed over the links; nothing else runs meanwhile
            (a compiled backward pass gives its gradients at its end)
    fsdp,   blocks are gathered in the precision of the arithmetic, twice a micro-batch, what is outside them once;
    hsdp    float32 gradients are scattered once a step, and summed over the copies. Only what outlasts the arithmetic
            counts, and one block's part in any case

Links reach LINK_SHARE of their data sheet, which is from fat5-base under ddp on two H200 (806,600 tokens/s for 429,200
of one); fsdp and other models are the prediction.
"""

from pathlib import Path
from statistics import median
from typing import Any

from fat5.errors import ConfigurationError
from fat5.train.checkpoint.generators import count_processes
from fat5.train.checkpoint.store import CheckpointStore
from fat5.train.cost.flops import Sheet
from fat5.train.cost.memory import Weights
from fat5.train.log.metrics import read_rows
from fat5.train.run_directory import RunDirectory
from fat5.yaml_text import read_yaml

MEMORY_SHARE = 0.8
"""Of the data sheet's bandwidth, for kernels that only read and write."""

LINK_SHARE = 0.5
"""Of the data sheet's bandwidth each way, for sums in messages of 25 MiB."""

NETWORK = 50.0
"""GB/s each way that a GPU has to other nodes: 400 Gb/s, an adapter for each GPU."""

NODE = 8
"""Most devices of a node."""

UPDATE_BYTES, COPY_BYTES = 44, 16
"""Bytes a parameter that a step reads and writes after its backward pass (gradient three times for norm and clipping,
weight for its RMS, then weight, gradient and both moments), and to copy gradients into messages and back."""


def step_seconds(single: float, weights: Weights, sheet: Sheet, devices: int, shards: int, micro_batches: int) -> float:
    """Seconds of a step of `devices`, of which `shards` hold the weights together.

    Args:
        single: seconds of the same step on one of them.
        micro_batches: of a process in a step.
    """
    if devices == 1:
        return single
    memory = sheet.bandwidth * 1e9 * MEMORY_SHARE
    update = min(UPDATE_BYTES * weights.parameters / memory, single / 2)
    arithmetic = (single - update) / devices
    gradients = 4 * weights.parameters
    if shards == 1:
        copies = COPY_BYTES * weights.parameters / memory
        return arithmetic + update + copies + 2 * _travel(gradients, devices, sheet)
    inside = weights.parameters - weights.outside
    gathered = micro_batches * (2 * weights.travel_bytes * inside + 4 * weights.outside)
    messages = _travel(gathered + gradients, shards, sheet)
    messages += 2 * _travel(gradients / shards, devices // shards, sheet, apart=devices > NODE)
    least = _travel(weights.travel_bytes * weights.block + 4 * weights.outside, shards, sheet)
    return arithmetic + update / shards + max(least, messages - arithmetic)


def _travel(size: float, members: int, sheet: Sheet, apart: bool = False) -> float:
    """Seconds in which each of `members` has sent and received its share of `size` bytes (a ring's half of a sum)."""
    speed = NETWORK if apart or members > NODE else sheet.link
    return (members - 1) / members * size / (speed * 1e9 * LINK_SHARE)


def measured_run(path: Path) -> tuple[float, dict[str, Any]]:
    """Useful tokens/s of a run (or of its metrics.jsonl) on one device, the median of its steps after the first tenth,
    and its configuration (empty if it is not beside).

    Raises:
        DataError: no metrics.
        ConfigurationError: a run of several processes, or with too few steps.
    """
    metrics = path / "metrics.jsonl" if path.is_dir() else path
    run = RunDirectory(metrics.parent)
    rows = [row for row in read_rows(metrics) if row.get("kind") == "train" and row.get("tokens_per_second")]
    if len(rows) < 3:
        raise ConfigurationError(f"has {len(rows)} timed steps", where=metrics, hint="Give a run of 3 steps or more")
    store = CheckpointStore(run.checkpoints, 1, 0, None)
    processes = max((count_processes(store.path(step)) for step in store.steps()), default=1)
    if processes > 1:
        raise ConfigurationError(
            f"is a run of {processes} processes", where=metrics.parent, hint="Give --measured a run on one device"
        )
    later = rows[max(1, len(rows) // 10) :]
    speed = median(float(row["tokens_per_second"]) for row in later)
    return speed, read_yaml(run.config, run.config) if run.config.is_file() else {}
