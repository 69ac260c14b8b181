"""The progress of a preparation, from small files of its tasks: a live line on a terminal, else one a minute."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fat5.data.shards.plan import LOGS
from fat5.files import naming

TELL_SECONDS = 0.5
LIVE_SECONDS, LINE_SECONDS = 1.0, 60.0
CLEAR = "\r\x1b[K"


class TaskProgress:
    """Writes how far a task is to a small file, which `watch` reads."""

    def __init__(self, folder: str, rank: int) -> None:
        self.path = Path(folder) / LOGS / "progress" / f"{rank:05d}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.documents = 0
        self._next = 0.0

    def tell(self, size: int, final: bool = False) -> None:
        """Writes the bytes read so far, at most twice a second."""
        if final or time.monotonic() > self._next:
            self._next = time.monotonic() + TELL_SECONDS
            with naming(self.path):
                self.path.write_text(json.dumps({"bytes": size, "documents": self.documents}))


@contextmanager
def watch(folder: Path, total: int, live: bool) -> Iterator[None]:
    """Shows progress, rate and time left on stderr while the body runs; `total` is in bytes, 0 if unknown."""
    stop = threading.Event()
    thread = threading.Thread(target=_show, args=(folder / LOGS / "progress", total, live, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _show(folder: Path, total: int, live: bool, stop: threading.Event) -> None:
    start = time.monotonic()
    while not stop.wait(LIVE_SECONDS if live else LINE_SECONDS):
        line = _line(folder, total, time.monotonic() - start)
        sys.stderr.write(f"{CLEAR}{line}" if live else f"{line}\n")
        sys.stderr.flush()
    if live:
        sys.stderr.write(CLEAR)


def _line(folder: Path, total: int, seconds: float) -> str:
    done = documents = 0
    for path in folder.glob("*.json"):
        with suppress(OSError, ValueError):  # being written
            told = json.loads(path.read_bytes())
            done, documents = done + told["bytes"], documents + told["documents"]
    part = f" of {total / 1e6:,.0f}" if total else ""
    left = f", {(total - done) / max(1, done) * seconds / 60:,.0f} min left" if total and done else ""
    return f"{done / 1e6:,.0f}{part} MB, {documents:,} documents, {done / 1e6 / seconds:,.1f} MB/s{left}"
