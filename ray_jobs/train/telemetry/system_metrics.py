"""What a worker uses of its machine: memory, processor, GPUs, as numbers for the run's history.

Keys that a machine has nothing for are left out: without a GPU there is no `gpu/…`.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from ray_jobs.train.telemetry import console

_SAMPLE_S = 1.0


def measure() -> dict[str, float]:
    """Return what this process and its node hold at this moment.

    `memory/worker_bytes` counts memory that processes share, such as Ray's object store, by each
    one's part (PSS), where the system says it. `gpu/memory_peak_bytes` is the most since the start
    of the process. Bytes of several GPUs are summed.
    """
    # Ray brings psutil along, and its measure of memory knows the limits of a container.
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    psutil: Any = import_module("psutil")
    memory = psutil.Process().memory_full_info()
    return {
        console.WORKER_BYTES: float(getattr(memory, "pss", memory.rss)),
        console.NODE_MEMORY_FRACTION: get_used_memory() / get_system_memory(),
        **_gpu_memory(),
    }


def _gpu_memory() -> dict[str, float]:
    import tensorflow as tf

    num_gpus = len(tf.config.get_visible_devices("GPU"))
    try:
        found = [tf.config.experimental.get_memory_info(f"GPU:{i}") for i in range(num_gpus)]
    except ValueError:  # An allocator that does not count.
        return {}
    if not found:
        return {}
    return {
        console.GPU_BYTES: float(sum(info["current"] for info in found)),
        console.GPU_PEAK_BYTES: float(sum(info["peak"] for info in found)),
    }


class Sampler:
    """Means over time: of the process's busy cores, and of its GPUs' utilisation.

    The processor's is exact, from the time that the system counted; the GPUs' is sampled every
    second in a thread of its own, which is not started where there is no GPU.

    Args:
        use_gpu: whether the process computes on GPUs; those of others are not looked at.
        nvml: the module `pynvml`; by default the one that Ray brings along.
    """

    def __init__(self, use_gpu: bool, nvml: Any = None) -> None:
        self._utilization = _gpu_utilization(nvml) if use_gpu else None
        self._samples: list[float] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._since = time.monotonic(), time.process_time()
        self._thread = threading.Thread(target=self._sample, name="resources", daemon=True)
        if self._utilization is not None:
            self._thread.start()

    def take(self) -> dict[str, float]:
        """Return the means since the last call, or since the beginning."""
        now, (wall, cpu) = (time.monotonic(), time.process_time()), self._since
        self._since = now
        with self._lock:
            samples, self._samples = self._samples, []
        means = {console.CPU_CORES: (now[1] - cpu) / max(now[0] - wall, 1e-9)}
        if samples:
            means[console.GPU_UTILIZATION] = sum(samples) / len(samples)
        return means

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _sample(self) -> None:
        read = self._utilization
        while read is not None and not self._stopped.is_set():
            # A driver that hiccups costs a sample, not the run.
            with suppress(Exception):
                sample = read()
                with self._lock:
                    self._samples.append(sample)
            self._stopped.wait(_SAMPLE_S)


def _gpu_utilization(nvml: Any) -> Callable[[], float] | None:
    """Return what reads the mean utilisation (0 to 1) of this process's GPUs; None without any."""
    if nvml is None:
        try:
            import ray._private.thirdparty.pynvml as nvml
        except ImportError:
            return None
    try:
        nvml.nvmlInit()
        handles = _visible_gpus(nvml)
    except Exception:  # No driver, or one without a part of NVML: there is nothing to say then.
        return None
    if not handles:
        return None

    def read() -> float:
        rates = [nvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles]
        return sum(rates) / len(rates) / 100

    return read


def _visible_gpus(nvml: Any) -> list[Any]:
    """Return the handles of the GPUs that CUDA lets this process see, all of them by default."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    names = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [
        nvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.isdigit()
        else nvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
    ]
