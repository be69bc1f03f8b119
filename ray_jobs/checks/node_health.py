"""Checks versions, clocks, shared memory and GPUs of the nodes."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ray_jobs.checks.finding import Finding, error, ok, skipped, warning
from ray_jobs.checks.probe import (
    NO_ANSWER,
    Node,
    clock,
    gpu_facts,
    package_versions,
    run_on_each,
    run_on_nodes,
    shared_memory_bytes,
)

_MUST_AGREE = ("python", "ray", "tensorflow", "keras")
_WARN_SKEW_S, _MAX_SKEW_S = 1.0, 60.0
_GPU_TIMEOUT_S = 60.0
"""Time to import TensorFlow and to run its first kernel on a GPU."""
_GPU_REMEDY = "make `nvidia-smi` work there and install tensorflow[and-cuda]"


def versions(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Compare each node's versions with those of this process."""
    own = package_versions()
    answers, findings = run_on_nodes("versions", nodes, package_versions)
    findings += version_findings(own, {node.name: theirs for node, theirs in answers.items()})
    yield from findings
    if not findings:
        shown = ", ".join(f"{name} {own[name]}" for name in _MUST_AGREE)
        count = f"{len(answers)} node{'s' * (len(answers) != 1)}"
        yield ok("versions", f"{shown} on the driver and on {count}")


def version_findings(
    own: Mapping[str, str], by_node: Mapping[str, Mapping[str, str]]
) -> Iterator[Finding]:
    """Yield a finding for each version that differs from the driver's.

    Args:
        own: The driver's versions by package.
        by_node: Versions by package, by node name.
    """
    for node, theirs in by_node.items():
        for name, version in own.items():
            found = theirs.get(name, "missing")
            if found != version:
                make = error if name in _MUST_AGREE else warning
                text = f"{node} has {name} {found}, the driver has {version}"
                python = ", with the same Python" if name in _MUST_AGREE else ""
                yield make("versions", text, f"install requirements.lock on every node{python}")


def clocks(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Compare each node's clock with that of this process."""
    skews = {}
    for node in nodes:
        # The fastest of several calls is the most precise; other checks report missing answers.
        tries = []
        for _ in range(3):
            called = time.time()
            answers, _ = run_on_nodes("clocks", [node], clock)
            returned = time.time()
            tries += [(returned - called, t - (called + returned) / 2) for t in answers.values()]
        if tries:
            skews[node.name] = min(tries)[1]
    yield from clock_findings(skews)


def clock_findings(skews_s: Mapping[str, float]) -> Iterator[Finding]:
    """Yield a finding for each wrong clock, given how many seconds each clock is ahead."""
    wrong = {node: skew for node, skew in skews_s.items() if abs(skew) >= _WARN_SKEW_S}
    for node, skew in wrong.items():
        text = f"the clock of {node} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
        remedy = "run an NTP client there; object stores refuse requests with a wrong time"
        make = error if abs(skew) >= _MAX_SKEW_S else warning
        yield make("clocks", text, remedy)
    if not wrong:
        most = max(map(abs, skews_s.values()), default=0.0)
        yield ok("clocks", f"all clocks are within {1000 * most:.0f} ms of the driver's")


def shared_memory(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check that each node's object store fits into its shared memory."""
    answers, failed = run_on_nodes("shared_memory", nodes, shared_memory_bytes)
    yield from failed
    stores = {node: int(node.resources.get("object_store_memory", 0)) for node in answers}
    small = {node: size for node, size in answers.items() if size and size < stores[node]}
    for node, size in small.items():
        yield warning(
            "shared_memory",
            f"the object store of {node.name} has {_gb(stores[node])} but /dev/shm only "
            f"{_gb(size)}, so Ray keeps it on disk, which is slow",
            f"give its container --shm-size={-(-stores[node] // 1_000_000_000)}g, or start Ray "
            "with a smaller --object-store-memory",
        )
    if answers and not small:
        total = _gb(sum(stores.values()))
        yield ok("shared_memory", f"the object stores fit into /dev/shm ({total} in total)")


def gpus(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check on each node with GPUs that TensorFlow sees one, and that cuDNN and NCCL load."""
    with_gpus = [node for node in nodes if node.resources.get("GPU")]
    if not with_gpus:
        yield skipped("gpus", "no node with GPUs is running")
        return
    facts, failed = run_on_each(
        "gpus",
        dict.fromkeys(with_gpus, ()),
        gpu_facts,
        _GPU_TIMEOUT_S,
        num_gpus=1,
        late_remedy="check with `ray status` whether other jobs hold its GPUs",
    )
    for finding in failed:
        yield replace(finding, status="warning") if NO_ANSWER in finding.text else finding
    for node, found in facts.items():
        yield from gpu_findings(node.name, found)


def gpu_findings(node: str, facts: Mapping[str, str | int]) -> Iterator[Finding]:
    """Yield findings for a node from the results of `gpu_facts`."""
    if not facts["gpus"]:
        yield error("gpus", f"TensorFlow sees no GPU on {node} ({facts['cuda']})", _GPU_REMEDY)
        return
    broken = [name for name in ("cudnn", "nccl") if facts.get(name)]
    for name in broken:
        shown = {"cudnn": "cuDNN", "nccl": "NCCL"}[name]
        yield error("gpus", f"{shown} does not load on {node}: {facts[name]}", _GPU_REMEDY)
    if not broken:
        yield ok("gpus", f"{node}: TensorFlow sees its GPUs, cuDNN and NCCL load ({facts['cuda']})")


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
