"""Profiles training steps for TensorBoard.

Writes `tensorboard/plugins/profile/TIME/HOST.xplane.pb` to the run folder. To view it, install
`tensorboard-plugin-profile` and run `tensorboard --logdir RUN/tensorboard`.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from ray_jobs.storage.folder import Folder
from ray_jobs.train.telemetry.history import TENSORBOARD


class Profiler:
    """Traces a range of steps once. If that fails, it warns and training continues.

    Args:
        folder: The run folder.
        steps: First and last step to trace, counted from 1; None for no trace.
        warn: Receives warnings for the user.
    """

    def __init__(
        self, folder: Folder, steps: tuple[int, int] | None, warn: Callable[[str], None]
    ) -> None:
        self.folder, self._warn = folder, warn
        self._first, self._last = steps or (0, 0)
        self._trace: ExitStack | None = None
        self._step = ExitStack()

    def before(self, step: int, count: int = 1) -> None:
        """Start the trace if the range includes one of the next `count` steps, from `step` on."""
        if step > self._last or step + count <= self._first:
            return
        if self._trace is None:
            self._start()
        if self._trace is not None:
            import tensorflow as tf

            # The profiler groups events by these step markers.
            self._step.enter_context(tf.profiler.experimental.Trace("train", step_num=step, _r=1))

    def after(self, step: int) -> None:
        """Stop the trace if `step`, the last one of the call, completes the range."""
        if self._trace is None:
            return
        self._step.close()
        if step >= self._last:
            self.close()

    def close(self) -> None:
        """Stop a running trace and write it to the run folder."""
        if self._trace is None:
            return
        trace, self._trace, self._last = self._trace, None, 0
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
            self._last = 0
            self._warn(f"could not start the profiler: {error}")
            return

        def stop() -> None:
            try:
                _wait_for_devices()
                profiler.stop()
                self.folder.upload(local, TENSORBOARD)
            except (tf.errors.OpError, OSError) as error:
                self._warn(f"could not write the profile: {error}")

        stack.callback(stop)
        self._trace = stack


def _wait_for_devices() -> None:
    """Wait for running GPU kernels, so that a trace contains only kernels of its own steps."""
    import tensorflow as tf

    tf.test.experimental.sync_devices()
