"""The checkpoints of a run: chosen when the run continues, kept or pruned by rule, saved in the background."""

import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fat5.errors import CheckpointError, CheckpointVersionError
from fat5.files import REMOVING, WRITING, sweep
from fat5.model.loading import refuse_adapter
from fat5.train.checkpoint.files import MANIFEST, read_manifest, remove_checkpoint, verify_checkpoint, write_checkpoint
from fat5.train.run_directory import runs_of_seeds
from fat5.train.world import World

PREFIX = "step-"

ATTEMPTS = 5
"""Saves that may fail in a row before the run gives up."""

RETRY_SECONDS = 60.0
"""Pause after the first failed save, doubled after each further one."""

LEAVING_SECONDS = 1.0
"""The same for the last save of a run, which must not keep a machine waiting."""


@dataclass
class Snapshot:
    """All of a run at one step, on the host and safe from further training."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File name → tensors"""
    documents: Mapping[str, str]
    """File name → text"""
    val_loss: float | None
    """What ranks the checkpoint (lower is better): the evaluation of this very step, if there was one"""


@dataclass
class Choice:
    """The checkpoint that a run continues from."""

    folder: Path
    refused: list[str] = field(default_factory=list)
    """Why each newer checkpoint was not taken"""

    @classmethod
    def of_main(cls, choose: Callable[[], "Choice | None"], world: World) -> "Choice | None":
        """What the main process chooses, for all: each of the others verifies the folder that it will read."""
        own = choose() if world.is_main else None
        told: Any = world.broadcast([str(own.folder), own.refused] if own is not None else None)
        if own is not None or told is None:
            return own
        verify_checkpoint(Path(told[0]))
        return cls(Path(told[0]), told[1])


class CheckpointStore:
    """The folder `checkpoints/` of a run, with its `step-N/`; what it keeps, RunConfig says."""

    def __init__(self, folder: Path, keep_last: int = 2, keep_best: int = 1, keep_every: int | None = None) -> None:
        self.folder = folder
        self.keep_last, self.keep_best, self.keep_every = keep_last, keep_best, keep_every

    def save(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint, and removes those that no rule keeps.

        Raises:
            OSError: the disk is full, read-only, or failing.
        """
        facts = {"step": snapshot.step, "val_loss": snapshot.val_loss}
        write_checkpoint(self.path(snapshot.step), snapshot.tensors, snapshot.documents, facts)
        self._prune(snapshot.step)

    def sweep(self) -> list[str]:
        """Removes what interrupted saves and removals left; returns the names."""
        for old in self.folder.glob(f"{REMOVING}*"):
            target = self.folder / old.name.removeprefix(REMOVING)
            # Killed between the two renames that replace a checkpoint: without the old one there would be none.
            if not target.exists() and target.with_name(WRITING + target.name).exists():
                old.rename(target)
        return sweep(self.folder)

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, oldest first, verified or not."""
        if not self.folder.is_dir():
            return []
        names = (entry.name for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(name[len(PREFIX) :]) for name in names if _is_step(name))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"{PREFIX}{step}"

    def choose(self, strict: bool = False) -> Choice | None:
        """The newest checkpoint that verifies; None if there is none at all.

        Raises:
            CheckpointError: the newest is damaged and `strict`, or every one is damaged; or one of another format
                version is newer than all that verify.
        """
        refused: list[str] = []
        for step in reversed(self.steps()):
            try:
                named = verify_checkpoint(self.path(step))["step"]
                if named != step:
                    raise CheckpointError(f"is the checkpoint of step {named}", where=self.path(step))
            except CheckpointVersionError:
                raise  # nothing is wrong with it: an older one would lose its steps
            except CheckpointError as error:
                if strict:
                    raise CheckpointError(
                        f"{error}",
                        hint="Restore it, remove its folder, or run without strict to take the one before it",
                    ) from error
                refused.append(str(error))
            else:
                return Choice(self.path(step), refused)
        if refused:
            raise CheckpointError(
                f"no checkpoint verifies: {'; '.join(refused)}",
                where=self.folder,
                hint="Restore one, or start a new run in another output_dir",
            )
        return None

    def best(self) -> int | None:
        """The step of the checkpoint with the lowest rank; None if none has one."""
        return next(iter(_by_rank(self._ranks())), None)

    def _prune(self, newest: int) -> None:
        """Removes what no rule keeps, among checkpoints up to `newest`; a damaged newer one does not count as kept."""
        ranks = {step: rank for step, rank in self._ranks().items() if step <= newest}
        steps = list(ranks)
        kept = set(steps[-self.keep_last :])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        kept |= set(_by_rank(ranks)[: self.keep_best])
        for step in steps:
            if step not in kept:
                remove_checkpoint(self.path(step))

    def _ranks(self) -> dict[int, float | None]:
        """Step → what ranks its checkpoint. A folder that was renamed or copied counts for no rule, and stays."""
        ranks = {}
        for step in self.steps():
            try:
                manifest = read_manifest(self.path(step))
            except CheckpointError:
                manifest = {"step": step}
            if manifest["step"] == step:
                ranks[step] = manifest.get("val_loss")
        return ranks


class Saver:
    """Saves snapshots of the current state in the background, and tries again when that fails.

    Args:
        snapshot: called by all processes at once; None in those that write nothing.
        warn: gets a line.
        decide: the main process's answer to a question, for all; the others wait for it.
    """

    def __init__(
        self,
        store: CheckpointStore,
        snapshot: Callable[[], Snapshot | None],
        warn: Callable[[str], None],
        decide: Callable[[bool], bool] = bool,
    ) -> None:
        self.store, self._decide = store, decide
        self._snapshot, self._warn = snapshot, warn
        self._thread = ThreadPoolExecutor(1, "fat5-save")
        self._saving: Future[None] | None = None
        self._failures = 0
        """In a row; above 0, a save is owed"""
        self._retry_at = 0.0

    def save(self) -> None:
        """Takes a snapshot and starts to write it, after the save before is done.

        After a failure nothing is tried before its pause is over, however many saves fall due in between: the next
        attempt saves the state at that time.

        Raises:
            CheckpointError: ATTEMPTS saves failed in a row.
        """
        self.settle()
        if self._decide(not self._failures or time.monotonic() >= self._retry_at):
            self._start()

    def wait(self) -> None:
        """Returns when no save is under way; does not warn of a failure."""
        if self._saving is not None:
            self._saving.exception()

    def settle(self, pause: float | None = None) -> None:
        """Returns when no save is under way; warns of a failure, and plans the next attempt after `pause` seconds."""
        if self._saving is not None:
            error = self._saving.exception()
            self._saving = None
            self._confirm(error, RETRY_SECONDS if pause is None else pause)

    def retry_due(self) -> bool:
        """True if a save of this process failed and its pause is over. Warns of a failure; never waits."""
        if self._saving is not None and not self._saving.done():
            return False
        self.settle()
        return self._failures > 0 and time.monotonic() >= self._retry_at

    def finish(self) -> None:
        """Returns when the last save is on the disk; one that waits for its pause is tried at once.

        Raises:
            CheckpointError: it could not be written.
        """
        self.settle()
        while self._decide(self._failures > 0):
            self._start()
            self.settle(LEAVING_SECONDS)
            if self._failures:
                time.sleep(max(0.0, self._retry_at - time.monotonic()))

    def _start(self) -> None:
        snapshot = self._snapshot()
        if snapshot is not None:
            self._saving = self._thread.submit(self.store.save, snapshot)

    def _confirm(self, error: BaseException | None, pause: float) -> None:
        """Notes how the last save ended; plans the next attempt if it failed."""
        if error is None:
            self._failures = 0
            return
        if not isinstance(error, OSError):
            raise error
        self._failures += 1
        reason = os.strerror(error.errno) if error.errno else str(error)
        if self._failures >= ATTEMPTS:
            raise CheckpointError(
                f"{self._failures} saves in a row failed ({reason})",
                where=self.store.folder,
                hint="Make room or mend the folder; the same command continues from the last checkpoint",
            ) from error
        seconds = pause * 2 ** (self._failures - 1)
        self._retry_at = time.monotonic() + seconds
        self._warn(
            f"CHECKPOINT NOT SAVED: {self.store.folder}: {reason}. Training goes on; next try in {seconds:.0f} s"
        )


def model_folder(folder: Path) -> Path:
    """The folder with the weights: a model or checkpoint itself, a run's model/, or its newest sound checkpoint.

    Raises:
        CheckpointError: there is none, or a damaged one.
    """
    if folder.is_file():
        raise CheckpointError("is a file; a model is a folder, and pickles are never read", where=folder)
    refuse_adapter(folder)
    if (folder / MANIFEST).is_file():
        verify_checkpoint(folder)
        return folder
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    choice = CheckpointStore(folder / "checkpoints").choose()
    if choice is None:
        runs = runs_of_seeds(folder)
        hint = f"Give one of its runs: {runs[0]}" if runs else "Give a run or model folder"
        raise CheckpointError("holds no model and no checkpoint", where=folder, hint=hint)
    return choice.folder


def _by_rank(ranks: Mapping[int, float | None]) -> list[int]:
    """The steps that have a rank, the best first."""
    known = {step: rank for step, rank in ranks.items() if rank is not None and not math.isnan(rank)}
    return sorted(known, key=lambda step: (known[step], step))


def _is_step(name: str) -> bool:
    number = name.removeprefix(PREFIX)
    return number.isascii() and number.isdecimal() and name == f"{PREFIX}{int(number)}"
