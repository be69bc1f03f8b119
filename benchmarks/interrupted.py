"""Checks that an interrupted `prepare` writes the same bytes as an uninterrupted one.

Method: 1,600 photo-like JPEGs of 320 px and a table with some bad rows. One `prepare` runs without
interruption. Another one is killed repeatedly (SIGKILL to its process group) and restarted: every
third time at a random moment around its first shard, otherwise shortly after a random number of
further shards. The last start is not interrupted. Then all files of both folders are compared:
manifest, shards and quarantine. Shards that were finished before a kill must not be written again.

Run:   python -m benchmarks.interrupted [--kills 10] [--rows 1600] [--seed 0]
The last line of the output is JSON.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).parents[1]
ROWS_PER_SHARD = 16
TIMEOUT_S = 300.0


def write_raw(folder: Path, num_rows: int, rng: np.random.Generator) -> None:
    """Write images and table; the image of one row in forty is truncated."""
    (folder / "images").mkdir()
    lines = ["key,area,label"]
    for row in range(num_rows):
        coarse = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        pixels = cv2.resize(coarse, (320, 320), interpolation=cv2.INTER_CUBIC)
        content = cv2.imencode(".jpg", pixels)[1].tobytes()
        content = content[: len(content) // 2] if row % 40 == 7 else content
        (folder / "images" / f"k{row}.jpg").write_bytes(content)
        lines.append(f"k{row},{rng.normal():.4f},{int(rng.random() < 0.4)}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")


def start(raw: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Start `prepare` in a folder, in its own process group."""
    folder.mkdir(exist_ok=True)
    settings = {
        "images": raw / "images",
        "table": raw / "table.csv",
        "output": "prepared",
        "image_size": 128,
        "rows_per_shard": ROWS_PER_SHARD,
        "max_bad_fraction": 0.1,
    }
    flags = [f"--prepare.{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.prepare", *flags],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes], folder: Path) -> float:
    """Wait for the end of `prepare`; return the seconds until its first shard was finished."""
    started = time.monotonic()
    while not finished(folder) and process.poll() is None:
        time.sleep(0.01)
    first_s = time.monotonic() - started
    if code := process.wait(TIMEOUT_S):
        raise RuntimeError(f"prepare ended with {code}")
    return first_s


def kill_after(
    process: subprocess.Popen[bytes], folder: Path, num_shards: int, delay_s: float
) -> int:
    """Kill `prepare` `delay_s` after it finished some shards; return the number of shards."""
    deadline = time.monotonic() + TIMEOUT_S
    while finished(folder) < num_shards:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"prepare did not finish {num_shards} shards")
        time.sleep(0.01)
    time.sleep(delay_s)
    if process.poll() is not None:
        raise RuntimeError("prepare ended before it was killed; increase --rows")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return finished(folder)


def finished(folder: Path) -> int:
    """Return the number of finished shards according to the journal."""
    return sum(1 for _ in (folder / "prepared" / "_progress").glob("*.json"))


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of each file of the prepared data."""
    files = [path for path in sorted((folder / "prepared").rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=10, help="number of kills")
    parser.add_argument("--rows", type=int, default=1600, help="rows of the table")
    parser.add_argument("--seed", type=int, default=0, help="seed of images and kill points")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        raw, uninterrupted, killed = (Path(temporary) / name for name in ("raw", "whole", "killed"))
        raw.mkdir()
        write_raw(raw, arguments.rows, rng)
        started = time.monotonic()
        first_s = finish(start(raw, uninterrupted), uninterrupted)
        seconds = time.monotonic() - started
        expected = hashes(uninterrupted)
        num_shards = sum(name.endswith(".parquet") for name in expected) - 1
        print(
            f"{num_shards} shards in {seconds:.1f} s without interruption; the first after "
            f"{first_s:.1f} s\n"
        )
        print("| kill | moment | finished shards |\n|---|---|---|")
        count = killed_among = 0
        for number in range(arguments.kills):
            if number % 3 == 2:
                target, delay_s = 0, rng.uniform(0, 1.1 * first_s)
                moment = f"after {delay_s:.1f} s"
            else:
                step = (num_shards - count) // (arguments.kills - number)
                target, delay_s = count + int(rng.integers(1, step + 2)), rng.uniform(0, 0.1)
                moment = f"shortly after shard {target}"
            count = kill_after(start(raw, killed), killed, target, delay_s)
            killed_among += 0 < count < num_shards
            print(f"| {number + 1} | {moment} | {count} |", flush=True)
        journal = (killed / "prepared" / "_progress").glob("*.json")
        shards = [json.loads(path.read_text())["shard"] for path in journal]
        paths = [killed / "prepared" / shard["path"] for shard in shards if shard]
        before = {path: path.stat().st_mtime_ns for path in paths}
        finish(start(raw, killed), killed)
        actual = hashes(killed)
        num_rewritten = sum(path.stat().st_mtime_ns != written for path, written in before.items())
    result = {
        "kills": arguments.kills,
        "same": actual == expected,
        "shards": num_shards,
        "killed_among_shards": killed_among,
        "finished_by_killed": len(before),
        "written_again": num_rewritten,
        "seed": arguments.seed,
    }
    print(f"\nsame files: {result['same']}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
