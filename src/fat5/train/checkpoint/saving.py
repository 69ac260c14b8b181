"""When a run saves, and what it does when the disk will not take it."""

import time
from collections.abc import Callable

from fat5.errors import CheckpointError
from fat5.train.checkpoint.store import CheckpointStore, Snapshot, describe_os_error

ATTEMPTS = 5
"""Saves that may fail in a row before the run gives up."""

RETRY_SECONDS = 60.0
"""Pause after the first failed save, doubled after each further one."""

LEAVING_SECONDS = 1.0
"""The same for the last save of a run, which must not keep a machine waiting."""


class Saver:
    """Saves snapshots in the background, and tries again when that fails.

    Args:
        store: where they go.
        snapshot: takes one of the run as it stands.
        warn: tells the user.
    """

    def __init__(self, store: CheckpointStore, snapshot: Callable[[], Snapshot], warn: Callable[[str], None]) -> None:
        self.store = store
        self._snapshot, self._warn = snapshot, warn
        self._failures = 0
        self._unconfirmed = False
        self._owed = False
        self._retry_at = 0.0

    def save(self) -> None:
        """Takes a snapshot and starts to write it, after the save before is done.

        After a failure nothing is tried before its pause is over, however many saves fall due in between: the next
        attempt saves the run as it then stands.

        Raises:
            CheckpointError: ATTEMPTS saves failed in a row.
        """
        self.settle()
        if not self._owed or time.monotonic() >= self._retry_at:
            self._start()

    def settle(self) -> None:
        """Returns when no save is under way, and tells of a failure."""
        self.store.wait()
        if self._unconfirmed:
            self._confirm(RETRY_SECONDS)

    def retry_due(self) -> bool:
        """Whether a save failed and its pause is over. Tells of a failure; never waits."""
        if self.store.busy:
            return False
        self.settle()
        return self._owed and time.monotonic() >= self._retry_at

    def finish(self) -> None:
        """Returns when the last save is on the disk; one that waits for its pause is tried at once.

        Raises:
            CheckpointError: it could not be written.
        """
        self.settle()
        while self._owed:
            self._start()
            self.store.wait()
            if not self._confirm(LEAVING_SECONDS):
                time.sleep(max(0.0, self._retry_at - time.monotonic()))

    def _start(self) -> None:
        self._unconfirmed = True
        self.store.save(self._snapshot())

    def _confirm(self, pause: float) -> bool:
        """True if the save that ended succeeded; else plans the next attempt."""
        self._unconfirmed = False
        error = self.store.take_error()
        self._owed = error is not None
        if error is None:
            self._failures = 0
            return True
        if not isinstance(error, OSError):
            raise error
        self._failures += 1
        reason = describe_os_error(error)
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
        return False
