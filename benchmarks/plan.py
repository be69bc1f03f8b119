"""Compares the time and memory that `plan` estimates for this machine's CPU with measurements.

Each configuration trains for some steps with the training loop on rows in memory, in a separate
process. The first one calibrates the machine: all rates of the entry `cpu` in
ray_jobs/plan/gpus.yaml are multiplied by one factor, so that the estimate of its step time is
exact. The others are then compared.

    step     median of the steps after the warm-up
    memory   peak of the process minus its memory before the model was built; the estimate excludes
             `reserved_gib`, the memory of the process itself

On a CPU, TensorFlow's grouped convolutions, which ConvNeXt uses, take many times as long as other
convolutions with the same number of operations. `plan` does not model kernels, so the step time of
ConvNeXt is shown but not counted.

Run:   python -m benchmarks.plan [--steps 12]
The last line of the output is JSON: the maximum factors between estimate and measurement.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
WARM_UP = 3
RESULT = "result.json"
CALIBRATES = "efficientnet_b0, 96 px"
GROUPED = "convnext_tiny, 96 px"
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    CALIBRATES: {},
    "the same, half the rows": {"train.global_batch_size": 16},
    "the same, in 4 parts": {"train.accumulate_steps": 4},
    "the same, backbone frozen": {"model.image.trainable": False},
    "the same, one core": {"train.cpus_per_worker": 1, "train.global_batch_size": 16},
    "efficientnet_b0, 160 px": {"data.image_size": 160, "train.global_batch_size": 16},
    "efficientnet_b5, 96 px": {
        "model.image.kind": "efficientnet_b5", "train.global_batch_size": 16,
    },
    "resnet50, 96 px": {"model.image.kind": "resnet50"},
    "mobilenet_v3_small, 128 px": {
        "model.image.kind": "mobilenet_v3_small", "data.image_size": 128,
        "train.global_batch_size": 64,
    },
    GROUPED: {"model.image.kind": "convnext_tiny", "train.global_batch_size": 16},
    "tiny, 128 px": {"model.image.kind": "tiny", "data.image_size": 128},
    "vit_base, 96 px": {"model.image.kind": "vit_base", "train.global_batch_size": 16},
    "bert_base, 64 tokens": {
        "model.image.kind": "none", "model.text.kind": "bert_base", "data.text": ["note"],
        "train.global_batch_size": 16,
    },
}  # fmt: skip


def make_spec(folder: str, name: str) -> Any:
    """Return the spec of a configuration."""
    from ray_jobs.config.spec import RunSpec

    base = {
        "run": {"storage_path": folder, "name": "run"},
        "data": {"prepared": f"{folder}/prepared", "image_size": 96},
        "model": {"image": {"kind": "efficientnet_b0", "weights": None}},
        "train": {"cpus_per_worker": os.cpu_count(), "schedule": "constant"},
    }
    return RunSpec.model_validate(base).overlay(CONFIGURATIONS[name])


def make_manifest(spec: Any) -> Any:
    """Return the manifest of the rows, with texts of 8,000 words if the spec has any."""
    from ray_jobs.data.manifest import read_manifest
    from ray_jobs.storage.folder import Folder

    words = tuple(map(str, range(8000))) if spec.data.text else ()
    manifest = read_manifest(Folder(spec.data.prepared))
    return manifest.model_copy(update={"text_columns": spec.data.text, "text_words": words})


def run(folder: str, name: str, steps: int) -> None:
    """Train a configuration, and write the time and memory of its steps to a file."""
    from ray_jobs.cluster.strategy import WorkerContext, set_devices

    spec = make_spec(folder, name)
    set_devices(spec.train.cpus_per_worker, use_gpu=False)

    from benchmarks.memory_loop import TimedLoop

    manifest = make_manifest(spec)
    before = _memory("VmRSS")
    ends = f"{folder}/ends.json"
    loop = TimedLoop(spec, manifest, WorkerContext(), num_steps=steps, ends=ends)
    arrays = sum(array.nbytes for array in loop.arrays.values())
    loop.run()
    wall_s, _ = np.diff(json.loads(Path(ends).read_text())["ends"][WARM_UP - 1 :], axis=0).T
    memory = _memory("VmHWM") - before - arrays
    result = {"step_s": float(np.median(wall_s)), "memory": memory}
    Path(f"{folder}/{RESULT}").write_text(json.dumps(result))


def _memory(name: str) -> int:
    """Return a memory figure of this process in bytes: VmRSS is the current, VmHWM the peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def measure(folder: str, name: str, steps: int) -> dict[str, float]:
    """Measure a configuration in a separate process."""
    command = [sys.executable, "-m", "benchmarks.plan", "--folder", folder, "--name", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([*command, "--steps", str(steps)], cwd=ROOT, env=environment, check=True)
    return json.loads(Path(f"{folder}/{RESULT}").read_text())


def estimate(folder: str, name: str, machine: Any) -> dict[str, float]:
    """Return the estimate of `plan` for a configuration."""
    from ray_jobs.plan.estimate import GIB, Estimator
    from ray_jobs.plan.layer_costs import model_costs

    spec = make_spec(folder, name)
    manifest = make_manifest(spec)
    plan = Estimator(spec, "cpu", machine, model_costs(spec, manifest), manifest).plan()
    (stage,) = plan.stages
    reserved = machine.reserved_gib * GIB
    return {"step_s": stage.compute_s, "memory": stage.memory.total - reserved}


def scaled(machine: Any, factor: float) -> Any:
    """Return a machine that is faster by a factor."""
    return machine.model_copy(
        update={
            "tflops": {name: value * factor for name, value in machine.tflops.items()},
            "bandwidth_gb_s": machine.bandwidth_gb_s * factor,
            "layer_us": machine.layer_us / factor,
        }
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=12, help="steps of each run, including the warm-up"
    )
    for name in ("--folder", "--name"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.name:
        run(arguments.folder, arguments.name, arguments.steps)
        return

    from benchmarks.photos import make_jpegs
    from benchmarks.shards import write_shards
    from ray_jobs.plan.plan_spec import TABLE, read_machines

    machine = read_machines(str(TABLE))["cpu"]
    with tempfile.TemporaryDirectory() as folder:
        num_rows = {"train": 4 * arguments.steps * 64, "validation": 32, "test": 32}
        write_shards(Path(folder) / "prepared", num_rows, make_jpegs(96), 96)
        measured = {}
        for name in CONFIGURATIONS:
            measured[name] = measure(folder, name, arguments.steps)
            print(name, measured[name], file=sys.stderr, flush=True)
        own = estimate(folder, CALIBRATES, machine)["step_s"]
        speed = own / measured[CALIBRATES]["step_s"]
        machine = scaled(machine, speed)
        print(f"this machine has {speed:.2f} times the speed of the entry `cpu`\n")
        print("| configuration | step, s | estimate | ratio | memory, MB | estimate | ratio |")
        print("|---|---|---|---|---|---|---|")
        worst = {"step_s": 1.0, "memory": 1.0}
        for name in CONFIGURATIONS:
            estimated, row = estimate(folder, name, machine), name
            for key, unit, digits in (("step_s", 1.0, 3), ("memory", 1e6, 0)):
                actual, expected = measured[name][key], estimated[key]
                ratio = expected / actual
                row += f" | {actual / unit:.{digits}f} | {expected / unit:.{digits}f} | {ratio:.2f}"
                if name != GROUPED or key != "step_s":
                    worst[key] = max(worst[key], ratio, 1 / ratio)
            print(f"| {row} |", flush=True)
    factors = {"step_time_factor": worst["step_s"], "memory_factor": worst["memory"]}
    print(json.dumps({name: round(factor, 2) for name, factor in factors.items()}))


if __name__ == "__main__":
    main()
