"""The checkpoints of a run: saved in the background, kept or pruned by rule, and chosen when the run continues."""

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fat5.errors import CheckpointError
from fat5.model.loading import refuse_adapter
from fat5.train.checkpoint import files as checkpoint_files
from fat5.train.checkpoint.files import MANIFEST, read_manifest, remove_checkpoint, verify_checkpoint, write_checkpoint

PREFIX = "step-"
TRAINER = "trainer.json"


@dataclass
class Snapshot:
    """All of a run at one step, on the host and safe from further training."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File name → tensors"""
    documents: Mapping[str, str]
    """File name → text"""
    val_loss: float | None
    """Validation loss at this very step, if it was evaluated"""


@dataclass
class Choice:
    """The checkpoint a run continues from, and those passed over on the way to it."""

    folder: Path
    refused: list[str] = field(default_factory=list)
    """Why each newer checkpoint was not taken"""


class CheckpointStore:
    """The folder `checkpoints/` of a run.

    Args:
        folder: holds `step-N/` folders; made when the first is saved.
        keep_last: newest checkpoints to keep.
        keep_best: checkpoints of lowest validation loss to keep.
        keep_every: keep those whose step is a multiple; None keeps none for that.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_best: int = 1, keep_every: int | None = None) -> None:
        self.folder = folder
        self.keep_last, self.keep_best, self.keep_every = keep_last, keep_best, keep_every
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Starts to write a checkpoint in the background, after the one before is done.

        The failure of a save is kept for `take_error`.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="fat5-save")
        self._thread.start()

    def wait(self) -> None:
        """Returns when no save is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def busy(self) -> bool:
        """True while a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def take_error(self) -> Exception | None:
        """What went wrong with a save since the last call, if anything."""
        error, self._error = self._error, None
        return error

    def sweep(self) -> list[str]:
        """Removes what an interrupted save left; returns the names."""
        return checkpoint_files.sweep(self.folder)

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
            CheckpointError: the newest is damaged and `strict`, or every one is damaged.
        """
        refused: list[str] = []
        for step in reversed(self.steps()):
            try:
                named = verify_checkpoint(self.path(step))["step"]
                if named != step:
                    raise CheckpointError(f"is the checkpoint of step {named}", where=self.path(step))
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

    def _misnamed(self, step: int) -> bool:
        """True for a folder that was renamed or copied; it counts for no rule, and is never removed."""
        try:
            return bool(read_manifest(self.path(step))["step"] != step)
        except CheckpointError:
            return False

    def _write(self, snapshot: Snapshot) -> None:
        try:
            facts = {"step": snapshot.step, "val_loss": snapshot.val_loss}
            write_checkpoint(self.path(snapshot.step), snapshot.tensors, snapshot.documents, facts)
            self._prune(snapshot.step)
        except Exception as error:  # handed to the training thread, which decides
            self._error = error

    def _prune(self, newest: int) -> None:
        """Removes what no rule keeps, among checkpoints up to `newest`; a damaged newer one does not count as kept."""
        steps = [step for step in self.steps() if step <= newest and not self._misnamed(step)]
        kept = set(steps[-self.keep_last :])
        if self.keep_every:
            kept |= {step for step in steps if step % self.keep_every == 0}
        losses = {step: loss for step in steps if (loss := _val_loss(self.path(step))) is not None}
        kept |= set(sorted(losses, key=lambda step: (losses[step], step))[: self.keep_best])
        for step in steps:
            if step not in kept:
                remove_checkpoint(self.path(step))


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
        raise CheckpointError("holds no model and no checkpoint", where=folder, hint="Give a run or model folder")
    return choice.folder


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The trainer's own part of a checkpoint: progress, data, loss_scale and configuration, each a mapping.

    Raises:
        CheckpointError: missing, or something else.
    """
    content = checkpoint_files.read_json(folder / TRAINER)
    for key in ("progress", "data", "loss_scale", "configuration"):
        if not isinstance(content.get(key), dict):
            raise CheckpointError(f"has no {key}", where=folder / TRAINER)
    return content


def to_text(content: Mapping[str, Any]) -> str:
    """JSON for a checkpoint; keys in order, so that equal states give equal bytes."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def describe_os_error(error: BaseException) -> str:
    """The reason of a failed save in a few words."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def _val_loss(folder: Path) -> float | None:
    try:
        loss = read_manifest(folder).get("val_loss")
    except CheckpointError:
        return None
    return None if loss is None or math.isnan(loss) else float(loss)


def _is_step(name: str) -> bool:
    number = name.removeprefix(PREFIX)
    return number.isascii() and number.isdecimal() and name == f"{PREFIX}{int(number)}"
