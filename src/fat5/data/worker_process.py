"""What a worker process owes the process that started it: it ends with it, and leaves the stop signals to it."""

import os
import signal
import threading
from multiprocessing import connection, parent_process

WATCH_SECONDS = 1.0


def end_with_parent() -> None:
    """Ends this process soon after the one that started it ended, however that happened.

    A thread watches: the kernel's own way (PR_SET_PDEATHSIG) follows the thread that forked, which may end earlier.
    """
    parent = parent_process()
    if parent is not None:
        watch = threading.Thread(target=_watch, args=(parent.sentinel, os.getppid()), name="fat5-watch", daemon=True)
        watch.start()


def leave_signals_to_parent() -> None:
    """Ignores the signals that stop a run. A terminal, Slurm, systemd and `timeout` send them to every process of a
    group, and the parent needs its workers until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _watch(sentinel: int, starter: int) -> None:
    # A worker that was forked later holds the sentinel open as well, so the parent's number is looked at too.
    while not connection.wait([sentinel], WATCH_SECONDS) and os.getppid() == starter:
        pass
    os._exit(1)
