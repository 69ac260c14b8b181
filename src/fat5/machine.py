"""The processor cores and the memory that this process may use."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
GIB = 1 << 30


def available_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_intel() -> bool:
    """Whether Linux says that the processor is Intel's."""
    return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in _lines(PROC / "cpuinfo"))


def available_memory() -> int | None:
    """Bytes that this process can still allocate: the least that the machine, its control groups and `ulimit -v` allow.

    None if the system does not say. Outside Linux, the memory of the whole machine.
    """
    free = [left for left in (_machine(), *_control_groups(), _address_space()) if left is not None]
    return max(0, min(free)) if free else None


def free_memory(device: Any) -> int | None:
    """Bytes that this process can still allocate on a torch device; None if the system does not say."""
    if device.type != "cuda":
        return available_memory()
    from torch.cuda import mem_get_info

    return int(mem_get_info(device)[0])


def _machine() -> int | None:
    meminfo = _fields(PROC / "meminfo")
    if "MemAvailable:" in meminfo:
        return meminfo["MemAvailable:"] * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _control_groups() -> Iterator[int]:
    """Bytes left under each memory limit of this process (container, Slurm, systemd), for cgroups v1 and v2.

    Inactive file pages count as free: the kernel reclaims them before an allocation fails.
    """
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, inactive = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        else:
            continue
        inside = Path(path.lstrip("/"))
        for folder in (root / inside, *(root / parent for parent in inside.parents)):
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                yield most - used + _fields(folder / "memory.stat").get(inactive, 0)


def _address_space() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _fields(PROC / "self" / "status").get("VmSize:")
    return limit - used * 1024 if limit != resource.RLIM_INFINITY and used is not None else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """The number in a file; None without such a file, or for "max"."""
    text = "".join(_lines(path))
    return int(text) if text.isdecimal() else None


def _fields(path: Path) -> dict[str, int]:
    """The lines of a file that are a name and a number."""
    words = [line.split() for line in _lines(path)]
    return {word[0]: int(word[1]) for word in words if len(word) >= 2 and word[1].isdecimal()}
