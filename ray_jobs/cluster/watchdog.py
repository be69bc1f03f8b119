"""Ends a worker that does not get on: a collective that never completes holds it for ever."""

import os
import threading
import time
from collections.abc import Callable


class Watchdog:
    """Watches this process; ends it after `timeout_s` seconds without a sign of life.

    The process is ended from outside of what it waits in, since nothing in it can be interrupted.

    Args:
        timeout_s: longest time between two signs of life.
        on_hang: told how long nothing happened, before the end.
        end: ends the process.
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
        """Give a sign of life."""
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
