import mmap
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from ray_jobs.train.telemetry import console, system_metrics
from ray_jobs.train.telemetry.system_metrics import Sampler, measure


class Nvml:
    """Stands for the module pynvml on a machine with three GPUs."""

    def __init__(self, rates: dict[str, list[int]]) -> None:
        self.rates = rates
        self.asked: list[str] = []

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.rates)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return list(self.rates)[index]

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        return name

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
        self.asked.append(handle)
        rates = self.rates[handle]
        return SimpleNamespace(gpu=rates.pop(0) if len(rates) > 1 else rates[0])


def sampled(sampler: Sampler, nvml: Nvml, count: int) -> dict[str, float]:
    """Return what was taken after `count` samples at least."""
    deadline = time.monotonic() + 30
    while len(nvml.asked) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    sampler.close()
    return sampler.take()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(system_metrics, "_SAMPLE_S", 0.01)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_the_workers_bytes_grow_by_what_it_holds_and_a_node_is_partly_used():
    measure()  # the first one imports
    before = measure()
    size = 64 << 20
    # Asked of the system: an array may get memory that this process holds already.
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1
        after = measure()
    grown = after[console.WORKER_BYTES] - before[console.WORKER_BYTES]
    # Other threads of this process, such as Ray's and TensorFlow's, hold more or less meanwhile.
    assert 0.5 * size < grown < 4 * size
    assert 0 < after[console.NODE_MEMORY_FRACTION] < 1


def test_memory_that_processes_share_counts_by_each_ones_part(tmp_path):
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
        alone = measure()[console.WORKER_BYTES]
        command = [sys.executable, "-c", look, str(file)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            together = measure()[console.WORKER_BYTES]
            other.communicate(b"\n")
    assert 0.3 * size < alone - together < 0.7 * size


def test_without_a_gpu_there_is_nothing_of_gpus():
    sampler = Sampler(use_gpu=False, nvml=Nvml({"a": [50]}))
    measured = {**measure(), **sampler.take()}
    assert measured.keys() == {
        console.WORKER_BYTES, console.NODE_MEMORY_FRACTION, console.CPU_CORES,
    }  # fmt: skip
    assert "resources" not in [thread.name for thread in threading.enumerate()]
    sampler.close()


def test_busy_cores_are_those_of_the_time_since_the_last_look():
    sampler = Sampler(use_gpu=False)
    started = time.process_time()
    while time.process_time() - started < 0.3:
        pass
    busy = sampler.take()[console.CPU_CORES]
    time.sleep(0.3)
    idle = sampler.take()[console.CPU_CORES]
    assert busy > 5 * idle
    assert busy > 0.2


def test_gpu_utilisation_is_the_mean_over_time_and_gpus():
    # Only the first sample finds them busy, whatever number of them there is in the end.
    nvml = Nvml({"a": [100, 0], "b": [50, 0]})
    sampler = Sampler(use_gpu=True, nvml=nvml)
    found = sampled(sampler, nvml, 6)[console.GPU_UTILIZATION]
    assert found == pytest.approx(0.75 / nvml.asked.count("b"))
    assert console.GPU_UTILIZATION not in sampler.take()
    assert "resources" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize(
    ("visible", "looked_at"),
    [("1", {"GPU-b"}), ("0,2", {"GPU-a", "GPU-c"}), ("GPU-c", {"GPU-c"}), ("", set()),
     ("-1", set())],
)  # fmt: skip
def test_only_gpus_that_the_process_may_use_are_looked_at(monkeypatch, visible, looked_at):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = Nvml({"GPU-a": [10], "GPU-b": [20], "GPU-c": [30]})
    sampler = Sampler(use_gpu=True, nvml=nvml)
    taken = sampled(sampler, nvml, 2 * len(looked_at))
    assert set(nvml.asked) == looked_at
    assert (console.GPU_UTILIZATION in taken) == bool(looked_at)


def test_a_sample_that_fails_is_left_out_and_the_next_one_counts():
    class Hiccups(Nvml):
        def nvmlDeviceGetUtilizationRates(self, handle: str) -> SimpleNamespace:
            rates = super().nvmlDeviceGetUtilizationRates(handle)
            if len(self.asked) == 1:
                raise RuntimeError("GPU is lost")
            return rates

    nvml = Hiccups({"a": [0, 80]})
    taken = sampled(Sampler(use_gpu=True, nvml=nvml), nvml, 3)
    assert taken[console.GPU_UTILIZATION] == pytest.approx(0.8)


def test_a_machine_without_a_driver_has_no_utilisation():
    class NoDriver(Nvml):
        def nvmlInit(self) -> None:
            raise RuntimeError("NVML Shared Library Not Found")

    sampler = Sampler(use_gpu=True, nvml=NoDriver({"a": [10]}))
    assert sampler.take().keys() == {console.CPU_CORES}


def test_the_library_that_ray_brings_has_what_is_asked_of_it():
    from ray._private.thirdparty import pynvml

    for name in dir(Nvml):
        if name.startswith("nvml"):
            assert callable(getattr(pynvml, name))


def test_bytes_of_several_gpus_are_summed(monkeypatch):
    import tensorflow as tf

    info = {"GPU:0": {"current": 3, "peak": 5}, "GPU:1": {"current": 4, "peak": 8}}
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["one", "two"])
    monkeypatch.setattr(tf.config.experimental, "get_memory_info", info.__getitem__)
    measured = measure()
    assert (measured[console.GPU_BYTES], measured[console.GPU_PEAK_BYTES]) == (7, 13)
