"""Checks that memory does not grow with the dataset: peaks of training runs on 1 GB and 8 GB.

Method: shards of photo-like JPEGs at 320 px; one epoch of the `train` job with two workers, the
`tiny` branch at 32 px and `data.object_store_memory` of 512 MB. Twice a second, the proportional
resident memory (PSS, which counts shared memory once) of the job and all its child processes is
summed. Page cache is not included, because no files are mapped.

Run:   python -m benchmarks.memory [--gigabytes 1 8]
The last line of the output is JSON: the peaks in MB, and the maximum divided by the minimum.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.photos import make_jpegs
from benchmarks.shards import write_shards

_POLL_S = 0.5


def resident_bytes(pid: int, *, with_children: bool = True) -> int:
    """Return the resident memory (PSS) of a process and all its children."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat") if with_children else ():
        with suppress(OSError):
            # The name in parentheses may contain spaces; the parent is the second word after it.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    total, pending = 0, [pid]
    while pending:
        member = pending.pop()
        pending += children.get(member, [])
        with suppress(OSError):
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
            pss = next(line for line in rollup.splitlines() if line.startswith("Pss:"))
            total += int(pss.split()[1]) * 1024
    return total


def peak_of(command: list[str]) -> tuple[int, float]:
    """Run a command; return its peak resident memory in bytes and its duration in seconds."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(_POLL_S)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return peak, time.monotonic() - started


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    images = make_jpegs(320, 400)
    row_bytes = sum(map(len, images)) / len(images)
    peaks: dict[str, int] = {}
    print("\n| shards | rows | seconds | peak of all processes |\n|---|---|---|---|")
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory() as folder:
            count = int(gigabytes * 1e9 / row_bytes)
            num_rows = {"train": count, "validation": 256, "test": 64}
            write_shards(Path(folder) / "prepared", num_rows, images, 320)
            command = [
                *(sys.executable, "-m", "ray_jobs.train"),
                *("--run.storage_path", folder, "--run.name", "run"),
                *("--data.prepared", f"{folder}/prepared", "--data.image_size", "32"),
                *("--data.object_store_memory", str(512 << 20)),
                *("--model.image.kind", "tiny", "--model.image.weights", "none"),
                *("--model.image.units", "8", "--train.num_workers", "2"),
                *("--train.epochs", "1", "--train.global_batch_size", "256"),
            ]
            peak, seconds = peak_of(command)
        peaks[f"{gigabytes:g} GB"] = round(peak / 1e6)
        print(f"| {gigabytes:g} GB | {count:,} | {seconds:.0f} | {peak / 1e6:,.0f} MB |")
    ratio = max(peaks.values()) / min(peaks.values())
    print(json.dumps({"peak_mb": peaks, "ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
