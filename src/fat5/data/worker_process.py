"""A worker process ends with its parent, and leaves the stop signals to it."""

import os
import signal
import threading
from multiprocessing import connection, parent_process

WATCH_SECONDS = 1.0


def end_with_parent() -> None:
    """Ends this process soon after its parent has ended.

    A thread watches the parent. The kernel's PR_SET_PDEATHSIG follows the thread that forked, which may end earlier.
    """
    parent = parent_process()
    if parent is not None:
        watch = threading.Thread(target=_watch, args=(parent.sentinel, os.getppid()), name="fat5-watch", daemon=True)
        watch.start()


def leave_signals_to_parent() -> None:
    """Ignores the signals that stop a run. Terminals, Slurm, systemd and `timeout` send them to a whole group, but the
    parent needs its workers until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _watch(sentinel: int, starter: int) -> None:
    # A worker forked later also holds the sentinel open, so the parent's pid is checked too.
    while not connection.wait([sentinel], WATCH_SECONDS) and os.getppid() == starter:
        pass
    os._exit(1)
