"""Measures memory, CPU and GPU use of a worker for the run's history.

Metrics that a machine cannot provide are left out, such as `gpu/…` without a GPU.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray_jobs.cluster import compat_ray
from ray_jobs.train.telemetry import history_keys

_SAMPLE_S = 1.0


def measure_memory() -> dict[str, float]:
    """Return the memory that this process, its node and its GPUs use now.

    `memory/worker_bytes` is the proportional set size (PSS) if the system reports it: memory that
    several processes share, such as Ray's object store, is divided among them.
    `gpu/memory_peak_bytes` is the maximum since the process started. GPU values are sums over the
    GPUs of the process.
    """
    memory = compat_ray.psutil().Process().memory_full_info()
    return {
        history_keys.WORKER_BYTES: float(getattr(memory, "pss", memory.rss)),
        history_keys.NODE_MEMORY_FRACTION: compat_ray.memory_fraction(),
        **_gpu_memory(),
    }


def _gpu_memory() -> dict[str, float]:
    import tensorflow as tf

    num_gpus = len(tf.config.get_visible_devices("GPU"))
    try:
        infos = [tf.config.experimental.get_memory_info(f"GPU:{i}") for i in range(num_gpus)]
    except ValueError:  # Not all allocators have statistics.
        return {}
    if not infos:
        return {}
    return {
        history_keys.GPU_BYTES: float(sum(info["current"] for info in infos)),
        history_keys.GPU_PEAK_BYTES: float(sum(info["peak"] for info in infos)),
    }


class UsageSampler:
    """Measures mean CPU cores in use and mean GPU utilization of this process.

    CPU use is exact, from the process's CPU time. GPU utilization is sampled every second in a
    thread, which runs only if the process uses GPUs.

    Args:
        use_gpu: Whether the process computes on GPUs.
        nvml: The module `pynvml`; by default the one that Ray bundles.
    """

    def __init__(self, use_gpu: bool, nvml: Any = None) -> None:
        self._utilization = _gpu_utilization(nvml or compat_ray.nvml()) if use_gpu else None
        self._samples: list[float] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._since = time.monotonic(), time.process_time()
        self._thread = threading.Thread(target=self._sample, name="resources", daemon=True)
        if self._utilization is not None:
            self._thread.start()

    def take(self) -> dict[str, float]:
        """Return the means since the last call, or since the start."""
        now, (wall, cpu) = (time.monotonic(), time.process_time()), self._since
        self._since = now
        with self._lock:
            samples, self._samples = self._samples, []
        means = {history_keys.CPU_CORES: (now[1] - cpu) / max(now[0] - wall, 1e-9)}
        if samples:
            means[history_keys.GPU_UTILIZATION] = sum(samples) / len(samples)
        return means

    def close(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _sample(self) -> None:
        read = self._utilization
        while read is not None and not self._stopped.is_set():
            # A driver error costs a sample, not the run.
            with suppress(Exception):
                sample = read()
                with self._lock:
                    self._samples.append(sample)
            self._stopped.wait(_SAMPLE_S)


def _gpu_utilization(nvml: Any) -> Callable[[], float] | None:
    """Return a function for the mean utilization (0 to 1) of this process's GPUs, if any."""
    try:
        nvml.nvmlInit()
        handles = _visible_gpus(nvml)
    except Exception:  # No bindings, no driver, or a driver without full NVML support.
        return None
    if not handles:
        return None

    def read() -> float:
        rates = [nvml.nvmlDeviceGetUtilizationRates(handle).gpu for handle in handles]
        return sum(rates) / len(rates) / 100

    return read


def _visible_gpus(nvml: Any) -> list[Any]:
    """Return the NVML handles of the GPUs in CUDA_VISIBLE_DEVICES, which defaults to all."""
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
