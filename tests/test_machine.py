"""How much memory a process may still take, from made files of /proc and /sys/fs/cgroup."""

import resource
from pathlib import Path

import pytest

from fat5 import machine

GIB = 1 << 30
FREE = 22 * GIB


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 22 GiB available and no limit."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    write(tmp_path / "proc" / "meminfo", f"MemTotal: 99999999 kB\nMemAvailable: {FREE // 1024} kB\n")
    write(tmp_path / "proc" / "self" / "status", f"VmPeak: 9 kB\nVmSize: {4 * GIB // 1024} kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limit_group(folder: Path, most: str, used: int, inactive: int) -> None:
    write(folder / "memory.max", f"{most}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 5\ninactive_file {inactive}\n")


def test_without_a_limit_it_is_what_the_kernel_says(system: Path) -> None:
    assert machine.available_memory() == FREE


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD", None])
def test_whose_processor_it_is(system: Path, vendor: str | None) -> None:
    if vendor is not None:
        write(system / "proc" / "cpuinfo", f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu avx2\n")
    assert machine.is_intel() == (vendor == "GenuineIntel")


def test_the_limit_of_a_container(system: Path) -> None:
    """Inside its own namespace a container sees its limit at the root."""
    write(system / "proc" / "self" / "cgroup", "0::/\n")
    limit_group(system / "cgroup", str(8 * GIB), used=3 * GIB, inactive=GIB)
    assert machine.available_memory() == 6 * GIB


def test_the_least_of_all_groups_above(system: Path) -> None:
    """As under Slurm: no limit at the step, one at the job, a wider one at the slice."""
    write(system / "proc" / "self" / "cgroup", "0::/slurm/job_7/step_0\n")
    limit_group(system / "cgroup" / "slurm" / "job_7" / "step_0", "max", GIB, 0)
    limit_group(system / "cgroup" / "slurm" / "job_7", str(4 * GIB), GIB, 0)
    limit_group(system / "cgroup" / "slurm", str(64 * GIB), 8 * GIB, 0)
    assert machine.available_memory() == 3 * GIB


def test_the_older_interface(system: Path) -> None:
    write(system / "proc" / "self" / "cgroup", "12:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n")
    write(system / "cgroup" / "memory" / "memory.limit_in_bytes", f"{5 * GIB}\n")
    write(system / "cgroup" / "memory" / "memory.usage_in_bytes", f"{GIB}\n")
    assert machine.available_memory() == 4 * GIB


def test_a_limit_that_is_already_passed_leaves_nothing(system: Path) -> None:
    write(system / "proc" / "self" / "cgroup", "0::/\n")
    limit_group(system / "cgroup", str(GIB), used=2 * GIB, inactive=0)
    assert machine.available_memory() == 0


def test_the_limit_of_the_shell(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (6 * GIB, 6 * GIB))
    assert machine.available_memory() == 2 * GIB


def test_a_system_without_proc_says_what_the_machine_has(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROC", system / "nowhere")
    size = machine.available_memory()
    assert size is not None
    assert size > GIB // 2


def test_cores_where_affinity_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no sched_getaffinity."""
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    assert machine.available_cores() == 12
