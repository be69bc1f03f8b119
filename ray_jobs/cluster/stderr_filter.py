"""Drops log lines of native libraries from stderr, which Python's logging cannot filter."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ACTOR_ARGUMENTS = "has constructor arguments in the object store and max_restarts > 0"
"""Error that Ray 2.60 logs for every actor of Ray Data.

Ray Data itself passes its actors' arguments through the object store and lets Ray restart them.
They can restart as long as the driver, which owns the arguments, is alive. Without restarts
(`max_restarts=0`), the loss of a node would end the job.
"""


@contextmanager
def drop_stderr_lines(*texts: str) -> Iterator[None]:
    """Drop the lines that contain one of the texts from this process's stderr in the block."""
    sys.stderr.flush()
    stderr, (source, sink) = os.dup(2), os.pipe()
    os.dup2(sink, 2)
    os.close(sink)

    def forward() -> None:
        with open(source, "rb") as lines:
            for line in lines:
                if not any(text.encode() in line for text in texts):
                    os.write(stderr, line)

    thread = threading.Thread(target=forward, name="stderr", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        # Closes the pipe, unless a child process still writes to it.
        os.dup2(stderr, 2)
        thread.join(timeout=1)
        if not thread.is_alive():
            os.close(stderr)
