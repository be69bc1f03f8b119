"""A trace of some steps, for TensorBoard's profiler.

Leaves: `tensorboard/plugins/profile/TIME/HOST.xplane.pb` in the run folder, which
`tensorboard --logdir RUN/tensorboard` shows where `tensorboard-plugin-profile` is installed.
"""

import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from ray_jobs.storage.folder import Folder
from ray_jobs.train.telemetry.history import TENSORBOARD

_log = logging.getLogger(__name__)


class Profiler:
    """Traces the steps of a range, the first time that they come; costs nothing beside them.

    A trace that fails is a warning: the training goes on.

    Args:
        folder: of the run.
        steps: first and last step to trace, where 1 is the first of the run; None for none.
        warn: takes a text for the user when that fails; by default logged.
    """

    def __init__(
        self,
        folder: Folder,
        steps: tuple[int, int] | None,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        self.folder, self.steps, self._warn = folder, steps, warn
        self._trace: ExitStack | None = None
        self._step = ExitStack()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def before(self, step: int, count: int = 1) -> None:
        """Begin the trace if it is time.

        Args:
            step: that comes next.
            count: of steps that are taken at once, this one among them.
        """
        if self.steps is None:
            return
        first, last = self.steps
        if step > last or step + count <= first:
            return
        if self._trace is None:
            self._start()
        if self._trace is not None:
            import tensorflow as tf

            # What the profiler tells steps by.
            self._step.enter_context(tf.profiler.experimental.Trace("train", step_num=step, _r=1))

    def after(self, step: int) -> None:
        """End the trace if this was its last step.

        Args:
            step: that is done; of several at once, the last of them.
        """
        if self._trace is None:
            return
        self._step.close()
        if self.steps is not None and step >= self.steps[1]:
            self.close()

    def close(self) -> None:
        """End a trace that was begun, and bring it to the run folder."""
        if self._trace is None:
            return
        trace, self._trace, self.steps = self._trace, None, None
        self._step.close()
        trace.close()

    def _start(self) -> None:
        import tensorflow as tf

        profiler: Any = tf.profiler.experimental
        stack = ExitStack()
        try:
            local = stack.enter_context(tempfile.TemporaryDirectory(prefix="profile-"))
            _wait_for_devices()
            profiler.start(local)
        except (tf.errors.OpError, OSError) as error:
            stack.close()
            self.steps = None
            self._warn(f"no trace of steps: {error}")
            return

        def stop() -> None:
            try:
                _wait_for_devices()
                profiler.stop()
                self.folder.upload(local, TENSORBOARD)
            except (tf.errors.OpError, OSError) as error:
                self._warn(f"the trace of steps was lost: {error}")

        stack.callback(stop)
        self._trace = stack


def _wait_for_devices() -> None:
    """Let what steps left to a GPU come to its end, in the trace that it belongs to."""
    import tensorflow as tf

    tf.test.experimental.sync_devices()
