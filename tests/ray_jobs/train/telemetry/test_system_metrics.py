import mmap
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from ray_jobs.train.telemetry import history_keys as keys
from ray_jobs.train.telemetry import system_metrics
from ray_jobs.train.telemetry.system_metrics import UsageSampler, measure_memory


class Nvml:
    """Fake of the module pynvml."""

    def __init__(self, rates: dict[str, list[int]]) -> None:
        self.rates = rates
        self.calls: list[str] = []

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.rates)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return list(self.rates)[index]

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        return name

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self.calls.append(handle)
        rates = self.rates[handle]
        return SimpleNamespace(gpu=rates.pop(0) if len(rates) > 1 else rates[0])


def sampled(sampler: UsageSampler, nvml: Nvml, count: int) -> dict[str, float]:
    """Return the means after at least `count` samples."""
    deadline = time.monotonic() + 30
    while len(nvml.calls) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    sampler.close()
    return sampler.take()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(system_metrics, "_SAMPLE_S", 0.01)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_worker_bytes_grow_with_allocated_memory():
    measure_memory()  # The first call imports modules.
    before = measure_memory()
    size = 64 << 20
    # A new mapping: an array may reuse memory of this process.
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
        after = measure_memory()
    grown = after[keys.WORKER_BYTES] - before[keys.WORKER_BYTES]
    # Other threads of this process, such as Ray's, allocate and free memory meanwhile.
    assert 0.5 * size < grown < 4 * size
    assert 0 < after[keys.NODE_MEMORY_FRACTION] < 1


def test_shared_memory_is_divided_among_processes(tmp_path):
    size = 64 << 20
    file = tmp_path / "shared"
    file.write_bytes(b"x" * size)
    look = (
        "import mmap, sys; file = open(sys.argv[1], 'rb'); "
        "shared = mmap.mmap(file.fileno(), 0, prot=1); shared[:: mmap.PAGESIZE]; "
        "print(flush=True); input()"
    )
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as shared:
        shared[:: mmap.PAGESIZE]
        alone = measure_memory()[keys.WORKER_BYTES]
        command = [sys.executable, "-c", look, str(file)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            together = measure_memory()[keys.WORKER_BYTES]
            other.communicate(b"\n")
    assert 0.3 * size < alone - together < 0.7 * size


def test_without_a_gpu_there_are_no_gpu_metrics():
    sampler = UsageSampler(use_gpu=False, nvml=Nvml({"a": [50]}))
    measured = {**measure_memory(), **sampler.take()}
    assert measured.keys() == {
        keys.WORKER_BYTES, keys.NODE_MEMORY_FRACTION, keys.CPU_CORES,
    }  # fmt: skip
    assert "resources" not in [thread.name for thread in threading.enumerate()]
    sampler.close()


def test_cpu_cores_are_measured_since_the_last_call():
    sampler = UsageSampler(use_gpu=False)
    started = time.process_time()
    while time.process_time() - started < 0.3:
        pass
    busy = sampler.take()[keys.CPU_CORES]
    time.sleep(0.3)
    idle = sampler.take()[keys.CPU_CORES]
    assert busy > 5 * idle
    assert busy > 0.2


def test_gpu_utilization_is_the_mean_over_time_and_gpus():
    # Only the first sample is busy; the number of samples varies.
    nvml = Nvml({"a": [100, 0], "b": [50, 0]})
    sampler = UsageSampler(use_gpu=True, nvml=nvml)
    found = sampled(sampler, nvml, 6)[keys.GPU_UTILIZATION]
    assert found == pytest.approx(0.75 / nvml.calls.count("b"))
    assert keys.GPU_UTILIZATION not in sampler.take()
    assert "resources" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("visible", "measured_gpus"),
    [("1", {"GPU-b"}), ("0,2", {"GPU-a", "GPU-c"}), ("GPU-c", {"GPU-c"}), ("", set()),
     ("-1", set())],
)  # fmt: skip
def test_only_visible_gpus_are_measured(monkeypatch, visible, measured_gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = Nvml({"GPU-a": [10], "GPU-b": [20], "GPU-c": [30]})
    sampler = UsageSampler(use_gpu=True, nvml=nvml)
    taken = sampled(sampler, nvml, 2 * len(measured_gpus))
    assert set(nvml.calls) == measured_gpus
    assert (keys.GPU_UTILIZATION in taken) == bool(measured_gpus)


def test_a_failed_sample_is_skipped():
    class FailsOnce(Nvml):
        def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
            rates = super().nvmlDeviceGetUtilizationRates(handle)
            if len(self.calls) == 1:
                raise RuntimeError("GPU is lost")
            return rates

    nvml = FailsOnce({"a": [0, 80]})
    taken = sampled(UsageSampler(use_gpu=True, nvml=nvml), nvml, 3)
    assert taken[keys.GPU_UTILIZATION] == pytest.approx(0.8)


def test_without_a_driver_there_is_no_utilization():
    class NoDriver(Nvml):
        def nvmlInit(self) -> None:
            raise RuntimeError("NVML Shared Library Not Found")

    sampler = UsageSampler(use_gpu=True, nvml=NoDriver({"a": [10]}))
    assert sampler.take().keys() == {keys.CPU_CORES}


def test_rays_nvml_bindings_have_the_needed_functions():
    from ray._private.thirdparty import pynvml

    for name in dir(Nvml):
        if name.startswith("nvml"):
            assert callable(getattr(pynvml, name))


def test_the_bytes_of_several_gpus_are_summed(monkeypatch):
    import tensorflow as tf

    info = {"GPU:0": {"current": 3, "peak": 5}, "GPU:1": {"current": 4, "peak": 8}}
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["one", "two"])
    monkeypatch.setattr(tf.config.experimental, "get_memory_info", info.__getitem__)
    measured = measure_memory()
    assert (measured[keys.GPU_BYTES], measured[keys.GPU_PEAK_BYTES]) == (7, 13)
