import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

_FAULTS = """
import resource
import tensorflow as tf
from ray_jobs.cluster.strategy import set_devices

set_devices(1, use_gpu=False)
for step in range(40):
    if step == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tf.random.uniform((32, 1024, 1024))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets options of glibc")
def test_tensors_reuse_freed_memory():
    """A tensor has 32,768 pages; without the setting, each step has as many page faults."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", _FAULTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert int(done.stdout) < 20 * 32_768 / 4, done.stderr
