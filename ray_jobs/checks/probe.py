"""Runs functions on the nodes of a cluster, and defines the functions that examine a node.

These return plain values, which the checks interpret. Their tasks reserve no CPU, so that they also
run on busy nodes.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ray_jobs.checks.finding import Finding, error
from ray_jobs.cluster.connection import first_line, root_cause
from ray_jobs.cluster.environment import PACKAGES
from ray_jobs.storage.folder import Folder

T = TypeVar("T")

TIMEOUT_S = 40.0
"""Enough to start a process on a busy node."""
NO_ANSWER = "no answer"
_NODE_REMEDY = (
    "install ray_jobs and requirements.lock on every node (`ray job submit` uploads the former), "
    "and make sure that the node is not overloaded; its raylet log has details"
)
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Node:
    """A node of the cluster.

    Args:
        id: Ray's node ID.
        name: Address and short ID, for messages.
        resources: Total resources, by Ray's names.
    """

    id: str
    name: str
    resources: Mapping[str, float] = field(hash=False)

    @property
    def key(self) -> str:
        """Short ID, for file names."""
        return self.id[:12]


def live_nodes() -> list[Node]:
    """Return all nodes that are alive."""
    import ray

    return [
        Node(
            id=node["NodeID"],
            name=f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})",
            resources=node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def run_on_nodes(
    check: str, nodes: Iterable[Node], function: Callable[..., T], *arguments: object
) -> tuple[dict[Node, T], list[Finding]]:
    """Run a function on several nodes at the same time; see `run_on_each`."""
    return run_on_each(check, dict.fromkeys(nodes, arguments), function)


def run_on_each(
    check: str,
    arguments: Mapping[Node, Sequence[object]],
    function: Callable[..., T],
    timeout_s: float = TIMEOUT_S,
    num_gpus: int = 0,
    late_remedy: str = "",
) -> tuple[dict[Node, T], list[Finding]]:
    """Run a function on each node with its own arguments.

    Args:
        check: Name of the check, for its findings.
        arguments: Arguments by node.
        function: Runs on the nodes.
        timeout_s: Time for all nodes together.
        num_gpus: GPUs per task.
        late_remedy: Remedy for a node that does not answer in time, instead of the usual one.

    Returns:
        The results by node, and an error for each node without a result.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)(function)
    calls = {}
    for node, given in arguments.items():
        placement = NodeAffinitySchedulingStrategy(node.id, soft=False)
        calls[task.options(scheduling_strategy=placement).remote(*given)] = node
    done, late = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    late_problem = f"{NO_ANSWER} within {timeout_s:.0f} s"
    problems = {calls[call]: (late_problem, late_remedy) for call in late}
    results = {}
    for call in late:
        ray.cancel(call, force=True)
    for call in done:
        try:
            results[calls[call]] = ray.get(call)
        except RayError as failure:
            problems[calls[call]] = (root_cause(failure), "")
    # A node that the autoscaler has removed in the meantime is not an error.
    alive = {node.id for node in live_nodes()}
    return results, [
        error(check, f"{node.name} did not run the check: {problem}", remedy or _NODE_REMEDY)
        for node, (problem, remedy) in problems.items()
        if node.id in alive
    ]


# -- functions that run on a node -----------------------------------------------------------------


def clock() -> float:
    """Return the node's time."""
    return time.time()


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the workers' packages, or `missing`.

    A note follows a version if the package is imported from a different place than its metadata.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
            continue
        if origin := _other_origin(name):
            versions[name] += f" (but imported from {origin})"
    return versions


def _other_origin(name: str) -> Path | None:
    """Return the folder that a package is imported from if it is not the installed one."""
    module = {"scikit-learn": "sklearn"}.get(name, name)
    spec = importlib.util.find_spec(module)
    installed = Path(str(importlib.metadata.distribution(name).locate_file(module)))
    # An editable installation has no such folder.
    if spec is None or spec.origin is None or not installed.is_dir():
        return None
    origin = Path(spec.origin).parent
    return None if origin.resolve() == installed.resolve() else origin


def shared_memory_bytes() -> int | None:
    """Return the size of the node's shared memory; None if it has none."""
    try:
        stat = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return None
    return stat.f_frsize * stat.f_blocks


def write_marker(folder: Folder, name: str) -> str:
    """Write a file that contains its own name; return the error, if any."""
    return _attempt(lambda: folder.write_text(name, name))[1]


def unreadable_markers(folder: Folder, names: Sequence[str]) -> list[str]:
    """Return the names of those markers that cannot be read or have other content."""
    contents = {name: _attempt(lambda name=name: folder.read_bytes(name))[0] for name in names}
    return [name for name, content in contents.items() if content != name.encode()]


def delete_folder(folder: Folder) -> None:
    """Delete a folder, as far as possible."""
    _attempt(lambda: folder.filesystem.delete_dir(folder.path))


def hash_files(folder: Folder, names: Sequence[str]) -> list[tuple[str | None, str]]:
    """Return the SHA-256 of each file, or None and the error if it cannot be read."""

    def read_hash(name: str) -> str:
        # Large reads, since each may be a request to an object store.
        path = folder.locate(name)
        with folder.filesystem.open_input_stream(path, buffer_size=1 << 22) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return [_attempt(lambda name=name: read_hash(name)) for name in names]


def gpu_facts() -> dict[str, str | int]:
    """Return what TensorFlow reports about the GPUs that Ray assigned to this process."""
    from ray_jobs.cluster.strategy import set_devices

    set_devices(1, use_gpu=True)
    import tensorflow as tf

    build: Any = tf.sysconfig.get_build_info()
    facts: dict[str, str | int] = {
        "gpus": len(tf.config.list_physical_devices("GPU")),
        "cuda": f"CUDA {build.get('cuda_version')}, cuDNN {build.get('cudnn_version')}",
    }
    if facts["gpus"]:
        image, kernel = tf.ones((1, 8, 8, 3)), tf.ones((3, 3, 3, 4))
        with tf.device("GPU:0"):
            facts["cudnn"] = _attempt(lambda: tf.nn.conv2d(image, kernel, 1, "SAME").numpy())[1]
        facts["nccl"] = _attempt(_load_nccl)[1]
    return facts


def _load_nccl() -> None:
    import ctypes

    libraries = (Path(path) / "nvidia/nccl/lib/libnccl.so.2" for path in sys.path)
    ctypes.CDLL(next((str(path) for path in libraries if path.exists()), "libnccl.so.2"))


def _attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """Return the result of a call and an empty text, or None and the error as one line."""
    try:
        return call(), ""
    except Exception as failure:  # File systems and drivers raise errors of any type.
        return None, f"{type(failure).__name__}: {first_line(failure)}"
