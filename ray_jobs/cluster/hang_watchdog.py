"""Ends a process that hangs, for example in a collective that never completes."""

import os
import threading
import time
from collections.abc import Callable


class Watchdog:
    """Ends this process after `timeout_s` seconds without a call to `alive`.

    The process is ended from a thread, since the blocked call cannot be interrupted.

    Args:
        timeout_s: Maximum time between two calls to `alive`.
        on_hang: Called before `end`, with the seconds since the last call to `alive`.
        end: Ends the process.
    """

    def __init__(
        self,
        timeout_s: float,
        on_hang: Callable[[float], None],
        end: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self.timeout_s, self.on_hang, self.end = timeout_s, on_hang, end
        self._closed = threading.Event()
        self._last = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def alive(self) -> None:
        """Restart the timeout."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(max(self._last + self.timeout_s - time.monotonic(), 0.0)):
            silent_s = time.monotonic() - self._last
            if silent_s >= self.timeout_s:
                try:
                    self.on_hang(silent_s)
                finally:
                    self.end()
                return
