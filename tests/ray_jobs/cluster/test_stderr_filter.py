import os
import subprocess
import sys

import pytest

from ray_jobs.cluster.stderr_filter import ACTOR_ARGUMENTS, drop_stderr_lines


def stderr_of(code: str) -> list[str]:
    """Return the lines that a script writes to stderr in a process of its own."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr.splitlines()


WRITE = """
import os, sys
from ray_jobs.cluster.stderr_filter import drop_stderr_lines

with drop_stderr_lines("noise"):
    os.write(2, b"some noise\\nfirst\\n")
    print("second", file=sys.stderr)
    os.write(2, b"more noise\\nthird, without a line break")
os.write(2, b"\\nnoise after the block\\n")
"""


def test_matching_lines_of_python_and_native_code_are_dropped():
    expected = ["first", "second", "third, without a line break", "noise after the block"]
    assert stderr_of(WRITE) == expected


def test_stderr_is_restored_after_an_error_while_a_child_process_still_writes(capfd):
    children: list[subprocess.Popen[bytes]] = []

    def fail() -> None:
        with drop_stderr_lines("noise"):
            child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            children.append(child)
            raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        fail()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"
    children[0].communicate(b"\n")


# Ray logs the error once per process, so the scripts need processes of their own.
RUN_ACTORS = """
import contextlib, sys
import pyarrow as pa
import ray
from ray_jobs.cluster.stderr_filter import ACTOR_ARGUMENTS, drop_stderr_lines

ray.init("local", num_cpus=2, log_to_driver=False)
import ray.data

class Identity:
    def __call__(self, table):
        return table

dataset = ray.data.from_arrow([pa.table({"row": [1]})]).map_batches(
    Identity, compute=ray.data.ActorPoolStrategy(size=1), batch_format="pyarrow"
)
with FILTER:
    assert dataset.count() == 1
"""


@pytest.mark.slow
def test_ray_logs_the_error_about_actor_arguments_only_without_the_filter():
    """Fails if an upgrade of Ray changes the error or makes the filter unnecessary."""
    unfiltered = stderr_of(RUN_ACTORS.replace("FILTER", "contextlib.nullcontext()"))
    assert any(ACTOR_ARGUMENTS in line for line in unfiltered)
    filtered = stderr_of(RUN_ACTORS.replace("FILTER", "drop_stderr_lines(ACTOR_ARGUMENTS)"))
    assert not any(ACTOR_ARGUMENTS in line for line in filtered)
