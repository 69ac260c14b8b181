"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio. What they do never touches training.

    Trackers    what the trainer feeds with rows          Tracker     what each of them can do
    Feed        a thread and a queue for one tracker      TRACKERS    name → class

Each tracker lives in a thread of its own behind a queue. If it raises, hangs or is slow, rows are lost to it and one
warning is given; the end of a run waits CLOSE_SECONDS for all of them together.
"""

import os
import queue
import re
import secrets
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fat5.errors import ConfigurationError, FAT5Error
from fat5.files import is_number, read_object, write_json
from fat5.train.log.metrics import parts

TRAIN_KEYS = (
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "data_wait_fraction",
    "encoder_fill",
    "decoder_fill",
    "mfu",
)

COUNTS = ("step", "tokens")
"""Numbers of an evaluation that are no scores."""

PROJECT = "fat5"
"""Unless WANDB_PROJECT or TRACKIO_PROJECT says otherwise."""

RUNS = "trackers.json"
"""In the folder of a run: tracker → the id of its run there, so that a continued run goes on in it."""

MOST_ROWS = 1000
"""Rows that wait for a slow tracker; later ones are lost to it."""

CLOSE_SECONDS = 5.0
POLL_SECONDS = 0.1

WANDB_DEFAULTS = {
    "WANDB_SILENT": "true",  # its lines would run into the display, and a question for a key would wait for an answer
    "WANDB_CONSOLE": "off",
    "WANDB_INIT_TIMEOUT": "30",  # seconds; Python does not exit before
    "WANDB_FINISH_TIMEOUT": str(CLOSE_SECONDS - 1),
}
"""Variables of wandb, where the user has not set them: some of them work in no other way."""

Say = Callable[[str], None]


class Tracker(ABC):
    """One tracker of one run. All methods are called in a thread of their own, and may raise or hang.

    Args:
        folder: of the training run.
        run: id of the tracker's run, the same when the training run continues.
        step: where the training run continues.
        config: its configuration, plain values.
    """

    name = ""
    """Its own, which its library has too"""

    def __init__(self, folder: Path, run: str, step: int, config: dict[str, Any]) -> None:
        self.folder, self.run, self.step, self.config = folder, run, step, config
        self.title = folder.resolve().name
        self._run: Any = None

    @abstractmethod
    def open(self) -> str | None:
        """Starts or continues the tracker's run; says where to see it."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Adds the numbers of a step; wandb ignores those of steps that the run already has."""
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """Ends it; returns when all is written, or after the time that the library allows."""
        self._run.finish()


class TensorBoard(Tracker):
    """Event files in DIR/tensorboard; TensorBoard hides later events of an interrupted part."""

    name = "tensorboard"

    def open(self) -> str | None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
        return None

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for key, value in scalars.items():
            self._run.add_scalar(key, value, step)

    def close(self) -> None:
        self._run.close()


class WandB(Tracker):
    """Weights & Biases, with its files in DIR/wandb. Its environment variables (WANDB_MODE=offline, …) hold."""

    name = "wandb"

    def open(self) -> str | None:
        for name, value in WANDB_DEFAULTS.items():
            os.environ.setdefault(name, value)
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.run,
            name=os.environ.get("WANDB_NAME", self.title),
            resume="allow",
            dir=str(self.folder),
            config=self.config,
        )
        if getattr(self._run, "offline", False):
            return f"offline; to upload it: wandb sync {self.folder / 'wandb'}/offline-run-*-{self.run}"
        return getattr(self._run, "url", None)


class Trackio(Tracker):
    """Trackio, on this machine, or where its environment variables (TRACKIO_SPACE_ID, …) say."""

    name = "trackio"

    def open(self) -> str | None:
        import trackio

        self._keep_stdout_clean()
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        name = f"{self.title}-{self.run}"  # by which Trackio tells runs apart
        self._run = trackio.init(project=project, name=name, resume="allow", config=self.config, embed=False)
        self._keep_stdout_clean()
        return f'to see it: trackio show --project "{project}"'

    def _keep_stdout_clean(self) -> None:
        """Takes the place of `print` in trackio, which prints its news: stdout carries the summary of a run, which
        another program may read.
        """
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == self.name and module is not None:
                vars(module)["print"] = _print_warnings


TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (TensorBoard, WandB, Trackio)}


class Feed:
    """Feeds one tracker in the background. Its warnings are given by `write` and `close`, in the thread that trains.

    Args:
        tracker: not opened yet.
        say: called with where to see the run.
        warn: called once at most for each kind of fault.
    """

    def __init__(self, tracker: Tracker, say: Say, warn: Say) -> None:
        self.tracker, self._say, self._warn = tracker, say, warn
        self._rows: queue.Queue[tuple[int, dict[str, float]]] = queue.Queue(MOST_ROWS)
        self._told: deque[tuple[Say, str]] = deque()
        self._ending, self._faulty, self._full = threading.Event(), False, False
        self._thread = threading.Thread(target=self._work, name=f"fat5-{tracker.name}", daemon=True)

    def start(self) -> None:
        """Opens the tracker; does nothing the second time."""
        if self._thread.ident is None:
            self._thread.start()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Hands the numbers of a step on; never waits."""
        self._tell()
        if self._thread.ident is not None and not self._thread.is_alive():
            return
        try:
            self._rows.put_nowait((step, scalars))
        except queue.Full:
            if not self._full:
                self._warn(f"{self.tracker.name} does not keep up: rows are lost to it; metrics.jsonl has all")
            self._full = True

    def end(self) -> None:
        """Asks the tracker to write what waits, and to close."""
        self.start()
        self._ending.set()

    def wait(self, until: float) -> None:
        """Waits for that, at most until a time of the monotonic clock."""
        self._thread.join(max(0.0, until - time.monotonic()))
        self._tell()
        if self._thread.is_alive():
            self._warn(f"{self.tracker.name} did not end in time: its last rows may be missing; metrics.jsonl has all")

    def _work(self) -> None:
        tracker = self.tracker
        try:
            where = tracker.open()
        except BaseException as error:  # wandb raises KeyboardInterrupt where it cannot ask
            self._told.append((self._warn, f"{tracker.name} is off: {_first_line(error)}; training goes on"))
            return
        if where:
            self._told.append((self._say, f"{tracker.name:<7} {where}"))
        while True:
            try:
                row = self._rows.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._ending.is_set():
                    break
            else:
                self._guard(partial(tracker.write, *row))
        self._guard(tracker.close)

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            if not self._faulty:
                line = f"{self.tracker.name} lost a row: {_first_line(error)}; training goes on"
                self._told.append((self._warn, line))
            self._faulty = True

    def _tell(self) -> None:
        while self._told:
            call, line = self._told.popleft()
            call(line)


class Trackers:
    """The trackers of a run, as the trainer knows them.

    Args:
        names: keys of TRACKERS.
        every: steps between two train rows that are handed on.
        folder, step, config, say, warn: as in `Tracker` and `Feed`.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, step: int, config: dict[str, Any], every: int, say: Say, warn: Say
    ) -> None:
        self.every = every
        runs = _runs(names, folder / RUNS, warn) if names else {}
        self.feeds = [Feed(TRACKERS[name](folder, runs[name], step, config), say, warn) for name in names]

    def write(self, row: dict[str, Any]) -> None:
        """Hands on a row of metrics.jsonl, train or eval."""
        is_train = row["kind"] == "train"
        for feed in self.feeds:
            # Not earlier: the first step forks the data's workers, which a thread might leave with its locks.
            if is_train:
                feed.start()
            if not is_train or row["step"] % self.every == 0:
                feed.write(row["step"], scalars(row))

    def close(self) -> None:
        """Ends all of them; waits CLOSE_SECONDS at most."""
        until = time.monotonic() + CLOSE_SECONDS
        for feed in self.feeds:
            feed.end()
        for feed in self.feeds:
            feed.wait(until)


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row that trackers draw, by the name of their curve."""
    if row["kind"] == "train":
        found = {f"train/{key}": row.get(key) for key in TRAIN_KEYS}
    else:
        found = {f"validation/{key}": value for key, value in row.items() if key not in COUNTS and is_number(value)}
        part, scores = parts(row)
        found |= {f"validation by {part}/{name}": score["loss"] for name, score in scores.items()}
    return {key: value for key, value in found.items() if value is not None}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigurationError for a tracker whose library is not installed; imports none."""
    for name in names:
        if sys.modules.get(name) is None and find_spec(name) is None:
            install = "pip install tensorboard" if name == "tensorboard" else f"pip install 'fat5[{name}]'"
            raise ConfigurationError(f"report_to names {name}, and the {name} package is not installed", hint=install)


def _runs(names: Sequence[str], path: Path, warn: Say) -> dict[str, str]:
    """The id of each tracker's run, from a file, where new ones are added."""
    runs: dict[str, Any] = {}
    try:
        runs = read_object(path, FAT5Error) if path.exists() else {}
    except FAT5Error as error:
        warn(f"{error}; trackers begin new runs")
    known = {name: run for name, run in runs.items() if isinstance(run, str) and re.fullmatch(r"[\w-]{1,64}", run)}
    missing = [name for name in names if name not in known]
    known |= {name: secrets.token_hex(4) for name in missing}
    if missing:
        try:
            write_json(path, known)
        except OSError as error:
            warn(f"{path.name} cannot be written ({error.strerror}): a continued run begins new ones with its trackers")
    return known


def _print_warnings(*values: object, **_: object) -> None:
    line = " ".join(map(str, values))
    if "warning" in line.lower():
        sys.stderr.write(line + "\n")


def _first_line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}{f' ({said[0][:200]})' if said else ''}"
