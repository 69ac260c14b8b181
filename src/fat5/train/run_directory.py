"""The folder of a run: file names and lock. A folder with anything else in it is refused.

DIR/run.json       marks the folder as a run of FAT5, from its first second
DIR/run.lock       who trains here now (pid, host); a stale lock is taken over
DIR/config.yaml    the complete, resolved configuration        DIR/metrics.jsonl   a row a step, the record of truth
DIR/events.jsonl   starts, resumes, refusals, faults           DIR/loss.png        the curves so far
DIR/checkpoints/   step-N/ folders                             DIR/model/          the trained model and tokenizer
DIR/summary.json   written when the run is done
DIR/discarded.jsonl  lines taken out of metrics.jsonl: rows after the checkpoint of a resume or rewind, damaged lines
DIR/trackers.json  ids of the runs in wandb and trackio        DIR/tensorboard/, DIR/wandb/   what trackers write
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import Any

from fat5.errors import FAT5Error, RunDirectoryError
from fat5.files import is_count, is_leftover, locked, parse_json, write_atomically

MARKER = "run.json"
LOCK = "run.lock"
GUARD = f".{LOCK}.guard"
FORMAT = 1

HEARTBEAT_SECONDS = 10.0
"""How often a running process touches its lock, for those who look at it from another host."""

LARGEST_PID = 1 << 31
"""Process numbers are below this; 0 and negative numbers stand for groups of processes."""

STALE_SECONDS = 60.0
"""A lock of another host without a touch for this long is stale: six heartbeats, to outlast a slow file server."""


def runs_of_seeds(folder: Path) -> list[Path]:
    """The runs in a folder that `fat5 finetune --seeds N` wrote; none in any other folder."""
    found = [path.parent for path in folder.glob("seed-*/metrics.jsonl") if path.parent.name[5:].isdecimal()]
    return [] if (folder / "metrics.jsonl").is_file() else sorted(found, key=lambda run: int(run.name[5:]))


class RunDirectory:
    """Paths of a run's files, and the right to write them.

    Use as a context manager: entering marks the folder and takes its lock, leaving gives the lock back.

    Raises:
        RunDirectoryError: (on entering) the folder has other content, cannot be written, or is in use.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.discarded = self.path / "discarded.jsonl"
        self.plot = self.path / "loss.png"
        self.summary = self.path / "summary.json"
        self.model = self.path / "model"
        self.checkpoints = self.path / "checkpoints"
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        self._made: list[Path] = []

    @property
    def holds_run(self) -> bool:
        """True once the folder is marked as a run."""
        return (self.path / MARKER).is_file()

    def mark(self) -> None:
        """Makes the folder and marks it as a run's.

        Raises:
            RunDirectoryError: it contains something that is not a run, or cannot be written.
        """
        if self.holds_run:
            return
        try:
            if self.path.exists():
                others = sorted(name for name in os.listdir(self.path) if name != LOCK and not is_leftover(name))
                if others:
                    raise RunDirectoryError(
                        f"holds something that is not a FAT5 run ({', '.join(others[:3])}{', …' * (len(others) > 3)})",
                        where=self.path,
                        hint="Choose an empty or new output_dir",
                    )
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / MARKER, json.dumps({"format": "fat5-run", "version": FORMAT}) + "\n")
        except OSError as error:
            raise RunDirectoryError(
                f"cannot be made or written ({error.strerror})", where=self.path, hint="Choose another output_dir"
            ) from error

    def __enter__(self) -> "RunDirectory":
        self.mark()
        self._take_lock()
        self._heart = threading.Thread(target=self._beat, name="fat5-heartbeat", daemon=True)
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        if self._heart is not None:
            self._heart.join()
        if (_read_lock(self.path / LOCK) or {}).get("pid") == os.getpid():
            (self.path / LOCK).unlink(missing_ok=True)
        refused = bool(self._made) and kind is not None and issubclass(kind, FAT5Error)
        if refused and {entry.name for entry in self.path.iterdir()} <= {MARKER, GUARD}:
            shutil.rmtree(self.path, ignore_errors=True)  # nothing of a run came to be
            with contextlib.suppress(OSError):  # a parent that has other content stays
                for parent in self._made[1:]:
                    parent.rmdir()

    def _take_lock(self) -> None:
        lock = self.path / LOCK
        with locked(self.path / GUARD):  # one process at a time judges and takes the lock
            holder = _read_lock(lock)
            if holder is not None and _is_alive(holder, lock):
                raise RunDirectoryError(
                    f"in use by process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}",
                    where=self.path,
                    hint=f"Wait for it to end, or choose another output_dir (the lock is {lock.name})",
                )
            own = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": _start_time(os.getpid()),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
            write_atomically(lock, json.dumps(own) + "\n")

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path / LOCK)


def _read_lock(lock: Path) -> dict[str, Any] | None:
    try:
        content = parse_json(lock.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_alive(holder: dict[str, Any], lock: Path) -> bool:
    pid = holder.get("pid")
    if not is_count(pid) or not 0 < pid < LARGEST_PID:
        return False
    if holder.get("host") != socket.gethostname():
        return _age(lock) < STALE_SECONDS
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # A process number is given out again; the start time tells its bearers apart.
    return holder.get("started") in (None, _start_time(pid))


def _age(lock: Path) -> float:
    """Seconds since the lock was touched, by the file server's own clock."""
    probe = lock.with_name(f".{lock.name}.probe")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink(missing_ok=True)
    return now - lock.stat().st_mtime


def _start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; None where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])
