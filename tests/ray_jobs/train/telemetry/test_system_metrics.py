import mmap
import subprocess
import sys
import threading
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
        self.called = threading.Semaphore(0)

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
        self.called.release()
        rates = self.rates[handle]
        return SimpleNamespace(gpu=rates.pop(0) if len(rates) > 1 else rates[0])


def sampled(sampler: UsageSampler, nvml: Nvml, count: int) -> dict[str, float]:
    """Return the means after at least `count` samples."""
    for _ in range(count):
        assert nvml.called.acquire(timeout=30)
    sampler.close()
    return sampler.take()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(system_metrics, "_SAMPLE_S", 0.01)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


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
    assert 0 < measure_memory()[keys.NODE_MEMORY_FRACTION] < 1


@pytest.mark.parametrize("use_gpu", [True, False])
def test_without_a_gpu_or_a_driver_there_are_no_gpu_metrics(use_gpu):
    nvml = Nvml({"a": [50]})
    # Without a driver, no function works.
    nvml.nvmlInit = None if use_gpu else nvml.nvmlInit
    sampler = UsageSampler(use_gpu=use_gpu, nvml=nvml)
    measured = {**measure_memory(), **sampler.take()}
    assert measured.keys() == {keys.WORKER_BYTES, keys.NODE_MEMORY_FRACTION, keys.CPU_CORES}
    assert "resources" not in [thread.name for thread in threading.enumerate()]
    sampler.close()


def test_cpu_cores_are_measured_since_the_last_call(monkeypatch):
    clocks = {"monotonic": 10.0, "process_time": 3.0}
    fake = SimpleNamespace(**{name: lambda name=name: clocks[name] for name in clocks})
    monkeypatch.setattr(system_metrics, "time", fake)
    sampler = UsageSampler(use_gpu=False)
    clocks |= {"monotonic": 12.0, "process_time": 6.0}
    assert sampler.take() == {keys.CPU_CORES: 1.5}
    clocks |= {"monotonic": 14.0, "process_time": 6.5}
    assert sampler.take() == {keys.CPU_CORES: 0.25}


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
    [("0,2", {"GPU-a", "GPU-c"}), ("GPU-c", {"GPU-c"}), ("", set()), ("-1", set())],
)
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
