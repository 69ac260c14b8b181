"""The progress of a preparation, from small files that its tasks write: a bar on a terminal, else a line per minute."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fat5.data.shards.plan import LOGS
from fat5.files import naming

POLL_SECONDS = TELL_SECONDS = 0.5
LINE_SECONDS = 60.0


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
                self.path.write_text(json.dumps({"bytes": size, "documents": self.documents, "final": final}))


@contextmanager
def watch(folder: Path, total: int, bar: bool) -> Iterator[None]:
    """Shows progress, rate and time left while the body runs; `total` is in bytes, 0 if unknown."""
    stop = threading.Event()
    show = _bar if bar else _lines
    thread = threading.Thread(target=show, args=(Watched(folder), total, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Watched:
    """Sums up the progress files of a folder; reads those of finished tasks only once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / LOGS / "progress"
        self._final: dict[str, tuple[int, int]] = {}

    def read(self) -> tuple[int, int]:
        """(bytes, documents) so far."""
        sums = [0, 0]
        try:
            names = {path.name for path in self.folder.iterdir()}
        except OSError:
            return 0, 0
        self._final = {name: found for name, found in self._final.items() if name in names}
        for name in names:
            found = self._final.get(name)
            if found is None:
                try:
                    content = json.loads((self.folder / name).read_bytes())
                except (OSError, ValueError):
                    continue  # being written
                found = (content["bytes"], content["documents"])
                if content["final"]:
                    self._final[name] = found
            sums[0] += found[0]
            sums[1] += found[1]
        return sums[0], sums[1]


def _bar(watched: Watched, total: int, stop: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("preparing"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total or None, documents=0)
        while not stop.wait(POLL_SECONDS):
            done, documents = watched.read()
            progress.update(task, completed=done, documents=documents)


def _lines(watched: Watched, total: int, stop: threading.Event) -> None:
    start = time.monotonic()
    while not stop.wait(LINE_SECONDS):
        done, documents = watched.read()
        seconds = time.monotonic() - start
        part = f" of {total / 1e6:,.0f}" if total else ""
        left = f", {(total - done) / max(1, done) * seconds / 60:,.0f} min left" if total and done else ""
        said = f"{done / 1e6:,.0f}{part} MB, {documents:,} documents, {done / 1e6 / seconds:,.1f} MB/s{left}"
        sys.stderr.write(said + "\n")
        sys.stderr.flush()
