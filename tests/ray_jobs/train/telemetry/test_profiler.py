from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from ray_jobs.storage.folder import Folder
from ray_jobs.train.telemetry.profiler import Profiler


@tf.function
def one_training_step(x: tf.Tensor) -> tf.Tensor:
    return tf.linalg.matmul(x, x, name="product_of_a_step")


def profiling(folder: Folder, steps: tuple[int, int] | None) -> closing[Profiler]:
    """Profile a block; a warning fails the test."""
    return closing(Profiler(folder, steps, pytest.fail))


def run_steps(profiler: Profiler, steps: range, count: int = 1) -> None:
    x = tf.ones((16, 16))
    for step in steps[::count]:
        profiler.before(step, count)
        for _ in range(count):
            x = one_training_step(x) / 16
        profiler.after(step + count - 1)


def traces(folder: Path) -> list[Path]:
    return sorted(folder.glob("tensorboard/plugins/profile/*/*.xplane.pb"))


def steps_in(folder: Path) -> list[int]:
    """Return the numbers of the steps in a trace."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    (path,) = traces(folder)
    space = xplane_pb2.XSpace.FromString(path.read_bytes())
    found = set()
    for plane in space.planes:
        names = {key: value.name for key, value in plane.stat_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                if plane.event_metadata[event.metadata_id].name == "train":
                    found |= {
                        s.int64_value for s in event.stats if names[s.metadata_id] == "step_num"
                    }
    return sorted(found)


@pytest.mark.parametrize(
    ("traced", "run", "count", "found"),
    [
        ((3, 5), range(1, 9), 1, [3, 4, 5]),
        # Calls of four steps that overlap the range.
        ((3, 6), range(1, 13), 4, [1, 5]),
        # A run that ends within the range, and one that resumes there.
        ((2, 100), range(1, 4), 1, [2, 3]),
        ((2, 5), range(4, 9), 1, [4, 5]),
    ],
)
def test_a_trace_has_exactly_the_steps_of_the_range(tmp_path, traced, run, count, found):
    with profiling(Folder(tmp_path), traced) as profiler:
        run_steps(profiler, run, count)
        assert bool(traces(tmp_path)) == (run.stop > traced[1])
    assert steps_in(tmp_path) == found
    assert b"product_of_a_step" in traces(tmp_path)[0].read_bytes()


@pytest.mark.parametrize("steps", [None, (1, 3)])
def test_nothing_is_traced_without_a_range_or_after_it(tmp_path, steps):
    with profiling(Folder(tmp_path), steps) as profiler:
        run_steps(profiler, range(4, 7))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_step_ends_the_trace_and_another_one_can_start(tmp_path):
    def fail() -> None:
        with profiling(Folder(tmp_path / "first"), (1, 9)) as profiler:
            profiler.before(1)
            raise ValueError("the step failed")

    with pytest.raises(ValueError, match="the step failed"):
        fail()
    with profiling(Folder(tmp_path / "second"), (1, 2)) as profiler:
        run_steps(profiler, range(1, 3))
    assert steps_in(tmp_path / "second") == [1, 2]


def test_a_profiler_that_cannot_start_is_a_warning_only(tmp_path):
    warnings: list[str] = []
    other_profiler: Any = tf.profiler.experimental
    other_profiler.start(str(tmp_path / "other"))
    try:
        with closing(Profiler(Folder(tmp_path / "run"), (1, 2), warnings.append)) as profiler:
            run_steps(profiler, range(1, 4))
    finally:
        other_profiler.stop(save=False)
    assert [text.split(":")[0] for text in warnings] == ["could not start the profiler"]
    assert not (tmp_path / "run").exists()
