"""What only a node can know of itself, asked of all nodes at once.

A probe is an actor that takes no CPU, one on every node that is there. It answers with plain
values; what they mean is for the checks to say.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_jobs.checks.local import weights_problem
from ray_jobs.storage.folder import Folder

PACKAGES = ("ray", "tensorflow", "keras", "numpy", "pyarrow", "pydantic", "scikit-learn")
_SHARED_MEMORY = "/dev/shm"
ANSWERS_S = 40.0
"""In which a process starts on a node, on a busy one too, and answers."""


class Probe:
    """Lives on a node and looks at it."""

    def versions(self) -> dict[str, str]:
        """Return the versions of Python and of what workers import, `missing` where there is none.

        A package that is imported from elsewhere than its version was read says so.
        """
        found = {"python": platform.python_version()}
        for name in PACKAGES:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "missing"
                continue
            if shadow := _shadow(name):
                found[name] += f" (but imported from {shadow})"
        return found

    def clock(self) -> float:
        """Return the node's time."""
        return time.time()

    def shared_memory(self) -> int | None:
        """Return the bytes of shared memory that the node allows; None where there is no such."""
        try:
            stat = os.statvfs(_SHARED_MEMORY)
        except OSError:
            return None
        return stat.f_frsize * stat.f_blocks

    def write(self, folder: Folder, name: str) -> str:
        """Write a file that says its own name; return what went wrong, or nothing."""
        return _told(lambda: folder.write_text(name, name))

    def read(self, folder: Folder, names: Sequence[str]) -> list[str]:
        """Return those of some files that cannot be read, or say something else."""
        return [name for name in names if _told(lambda name=name: _require_name(folder, name))]

    def forget(self, folder: Folder) -> str:
        """Remove what was written."""
        return _told(lambda: folder.filesystem.delete_dir(folder.path))

    def hashes(self, folder: Folder, names: Sequence[str]) -> list[str]:
        """Return the hash of each of some files, or what went wrong in reading it."""
        return [_hash_or_problem(folder, name) for name in names]

    def weights_problem(self, weights: str, kind: str) -> str:
        """Return what keeps the node from the weights of an image branch, or nothing."""
        return weights_problem(weights, kind)

    def gpus(self) -> dict[str, Any]:
        """Return what TensorFlow makes of the GPUs that Ray gave this process."""
        from ray_jobs.cluster.strategy import set_devices

        set_devices(1, use_gpu=True)
        import tensorflow as tf

        found: dict[str, Any] = {"gpus": len(tf.config.list_physical_devices("GPU"))}
        build: Any = tf.sysconfig.get_build_info()
        found["cuda"] = f"CUDA {build.get('cuda_version')}, cuDNN {build.get('cudnn_version')}"
        if found["gpus"]:
            image, kernel = tf.ones((1, 8, 8, 3)), tf.ones((3, 3, 3, 4))
            with tf.device("GPU:0"):
                found["cudnn"] = _told(lambda: tf.nn.conv2d(image, kernel, 1, "SAME").numpy())
            found["nccl"] = _told(_load_nccl)
        return found


@dataclass(frozen=True, eq=False)
class Node:
    """A node that is there.

    Args:
        id: Ray's.
        name: for people.
        resources: Ray's.
        probe: that lives on it.
    """

    id: str
    name: str
    resources: dict[str, float]
    probe: Any

    @property
    def key(self) -> str:
        """A name for files."""
        return self.id[:12]


@contextmanager
def probed() -> Iterator[list[Node]]:
    """Yield all nodes, with a probe on each that is ended at the end."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor: Any = ray.remote(Probe)
    nodes = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        probe = actor.options(num_cpus=0, max_restarts=0, scheduling_strategy=there).remote()
        name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        nodes.append(Node(node["NodeID"], name, dict(node["Resources"]), probe))
    try:
        yield nodes
    finally:
        for node in nodes:
            ray.kill(node.probe)


def ask(
    nodes: Sequence[Node], method: str, *arguments: Any
) -> tuple[dict[Node, Any], dict[Node, str]]:
    """Ask the probes of some nodes at once; return the answers, and why others have none."""
    return ask_each([(node, arguments) for node in nodes], method)


def ask_each(
    of_each: Sequence[tuple[Node, Sequence[Any]]], method: str, timeout_s: float = ANSWERS_S
) -> tuple[dict[Node, Any], dict[Node, str]]:
    """Ask each probe with arguments of its own."""
    import ray
    from ray.exceptions import RayError

    from ray_jobs.cluster.connection import reason

    calls = {getattr(n.probe, method).remote(*given): n for n, given in of_each}
    done, late = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    silent = {calls[call]: f"it does not answer in {timeout_s:.0f} s" for call in late}
    answers = {}
    for call in done:
        try:
            answers[calls[call]] = ray.get(call)
        except RayError as failure:
            silent[calls[call]] = reason(failure)
    # A node that went away meanwhile, as an autoscaler's do, is nobody's fault.
    there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return answers, {node: why for node, why in silent.items() if node.id in there}


def sha256(folder: Folder, name: str) -> str:
    """Return the hash of a file."""
    with folder.filesystem.open_input_stream(folder.locate(name)) as stream:
        hashed = hashlib.sha256()
        while part := stream.read(1 << 22):
            hashed.update(part)
    return hashed.hexdigest()


def _hash_or_problem(folder: Folder, name: str) -> str:
    hashes: list[str] = []
    return _told(lambda: hashes.append(sha256(folder, name))) or hashes[0]


def _shadow(name: str) -> str | None:
    """Return from where a package is imported, if not from where its version was read."""
    module = {"scikit-learn": "sklearn"}.get(name, name)
    spec = importlib.util.find_spec(module)
    where = str(importlib.metadata.distribution(name).locate_file(module))
    origin = str(Path(spec.origin).parent) if spec and spec.origin else None
    # An editable installation is where it is.
    if (
        origin is None
        or Path(origin).resolve() == Path(where).resolve()
        or not Path(where).is_dir()
    ):
        return None
    return origin


def _load_nccl() -> None:
    import ctypes

    for path in sys.path:
        if (library := Path(path) / "nvidia/nccl/lib/libnccl.so.2").exists():
            ctypes.CDLL(str(library))
            return
    ctypes.CDLL("libnccl.so.2")


def _require_name(folder: Folder, name: str) -> None:
    if folder.read_bytes(name) != name.encode():
        raise ValueError("it says something else")


def _told(do: Any) -> str:
    """Do something; return what it raised, in a line, or nothing."""
    try:
        do()
    # Filesystems and drivers raise what they like; it is told in any case.
    except Exception as failure:
        lines = str(failure).strip().splitlines()
        return f"{type(failure).__name__}: {lines[0] if lines else ''}"
    return ""
