"""SIGTERM, SIGUSR1 and Ctrl-C: finish the step, save, leave; a second signal leaves at once."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


ECHO = 0.5
"""Seconds in which a signal that comes twice is one: `timeout` sends it to the process, and then to its whole group."""

LAUNCHER_ECHO = 2.0
"""The same where torchrun passes a signal on."""


class StopAsked(Exception):  # noqa: N818 - nothing went wrong
    """A stop signal came while this process worked alone."""


class RunStopped(KeyboardInterrupt):
    """A signal stopped the run after its state was saved; `signal` says which, `step` where."""

    def __init__(self, signum: int, step: int) -> None:
        self.signal = signal.Signals(signum)
        self.step = step
        super().__init__(f"stopped by {self.signal.name} after step {step}; the same command continues")


class StopRequest:
    """Context manager that turns the stop signals into a flag while training runs.

    Args:
        echo: seconds in which the same signal may come again and is not a second one.

    `received` is None or the number of the signal. Only the process that entered reacts: a forked child inherits the
    handler, and a signal sent to the whole group must not end a data worker before it ignores signals by itself.
    """

    def __init__(self, echo: float = ECHO) -> None:
        self.received: int | None = None
        self._echo, self._first = echo, 0.0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def is_asked(self) -> bool:
        """True after a signal."""
        return self.received is not None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self.received is not None:  # once the handlers are given back, an echo would end the process
            time.sleep(max(0.0, self._first + self._echo - time.monotonic()))
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self.received == number and time.monotonic() < self._first + self._echo:
            return
        if self.received is not None:
            os.write(2, b"\nfat5: second signal, leaving without saving\n")
            os._exit(128 + number)
        self.received, self._first = number, time.monotonic()
        name = signal.Signals(number).name
        # A handler may interrupt a print: write to the descriptor itself.
        os.write(2, f"\nfat5: {name} received; finishing the step, then saving (again to leave at once)\n".encode())
