"""Whether the nodes are alike, and each of them fit: versions, clocks, shared memory, GPUs."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray_jobs.checks.finding import Finding, error, ok, skipped, warning
from ray_jobs.checks.probe import ANSWERS_S, Node, Probe, ask

_MUST_AGREE = ("python", "ray", "tensorflow", "keras")
_CLOCK_WARNS_S, _CLOCK_FAILS_S = 1.0, 60.0
_GPU_ANSWERS_S = 60.0
"""TensorFlow's import, and its first kernel on a GPU."""


def answering(nodes: Sequence[Node]) -> tuple[list[Node], list[Finding]]:
    """Return the nodes on which this program starts, and what keeps it from others."""
    answers, silent = ask(nodes, "clock")
    found = [
        error(
            "nodes",
            f"no process of this program starts on {node.name}: {why}",
            "the program and requirements.lock must be on every node (`ray job submit "
            "--working-dir .` sends the first), and the node must not be overloaded",
        )
        for node, why in silent.items()
    ]
    return list(answers), found


def versions(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Compare each node's versions with those of this process."""
    here = Probe().versions()
    answers, silent = ask(nodes, "versions")
    yield from _silent("versions", silent)
    found = list(version_findings(here, {node.name: theirs for node, theirs in answers.items()}))
    yield from found
    if not found:
        shown = ", ".join(f"{name} {here[name]}" for name in _MUST_AGREE)
        yield ok("versions", f"{shown}, the same here and on {_count(answers)}")


def version_findings(
    here: Mapping[str, str], there: Mapping[str, Mapping[str, str]]
) -> Iterator[Finding]:
    """Say which nodes have other versions than the driver.

    Args:
        here: the driver's, by package.
        there: those of each node.
    """
    for node, theirs in there.items():
        for name, version in here.items():
            if (found := theirs.get(name, "missing")) == version:
                continue
            text = f"{node} has {name} {found}, the driver {version}"
            if name in _MUST_AGREE:
                yield error(
                    "versions",
                    text,
                    "install requirements.lock on every node, and the same Python",
                )
            else:
                yield warning("versions", text, "install requirements.lock on every node")


def clocks(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Compare each node's clock with that of this process."""
    import ray
    from ray.exceptions import RayError

    skews = {}
    for node in nodes:
        # Of several questions the quickest is the most exact. Other checks tell of silent nodes.
        tries = []
        with suppress(RayError):
            for _ in range(3):
                asked = time.time()
                theirs: Any = ray.get(node.probe.clock.remote(), timeout=ANSWERS_S)
                answered = time.time()
                tries.append((answered - asked, theirs - (asked + answered) / 2))
        if tries:
            skews[node.name] = min(tries)[1]
    yield from clock_findings(skews)


def clock_findings(skews_s: Mapping[str, float]) -> Iterator[Finding]:
    """Say which clocks go wrong, by the seconds that they are ahead of the driver's."""
    wrong = {node: skew for node, skew in skews_s.items() if abs(skew) >= _CLOCK_WARNS_S}
    for node, skew in wrong.items():
        text = f"the clock of {node} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
        remedy = "run an NTP client there; object stores refuse requests from wrong times"
        make = error if abs(skew) >= _CLOCK_FAILS_S else warning
        yield make("clocks", text, remedy)
    if not wrong:
        most = max(map(abs, skews_s.values()), default=0.0)
        yield ok("clocks", f"within {1000 * most:.0f} ms of the driver's")


def shared_memory(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check that each node's object store fits into the shared memory that it is allowed."""
    answers, silent = ask(nodes, "shared_memory")
    yield from _silent("shared memory", silent)
    stores = {node: int(node.resources.get("object_store_memory", 0)) for node in answers}
    small = [node for node, allowed in answers.items() if allowed and allowed < stores[node]]
    for node in small:
        yield warning(
            "shared memory",
            f"{node.name} allows {_gb(answers[node])} in /dev/shm, its object store is "
            f"{_gb(stores[node])}, which is then on disk, and slow",
            f"give its container --shm-size={-(-stores[node] // 1_000_000_000)}g, or start Ray "
            "with a smaller --object-store-memory",
        )
    if answers and not small:
        yield ok("shared memory", f"object stores of {_gb(sum(stores.values()))} in all fit in it")


def gpus(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check on each node with GPUs that TensorFlow sees one, and that cuDNN and NCCL load."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ray_jobs.cluster.connection import reason

    having = [node for node in nodes if node.resources.get("GPU")]
    if not having:
        yield skipped("GPUs", "no node with GPUs is there yet")
        return
    actor: Any = ray.remote(Probe)
    actors = {
        node: actor.options(
            num_cpus=0,
            num_gpus=1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote()
        for node in having
    }
    calls = {actor.gpus.remote(): node for node, actor in actors.items()}
    try:
        done, late = ray.wait(list(calls), num_returns=len(calls), timeout=_GPU_ANSWERS_S)
        for call in late:
            text = f"no GPU of {calls[call].name} answers in {_GPU_ANSWERS_S:.0f} s"
            yield warning("GPUs", text, "others may hold them all: `ray status` tells")
        for call in done:
            try:
                yield from gpu_findings(calls[call].name, ray.get(call))
            except RayError as failure:
                yield error("GPUs", f"{calls[call].name}: {reason(failure)}", _DRIVER)
    finally:
        for actor in actors.values():
            ray.kill(actor)


_DRIVER = "`nvidia-smi` must work there, and tensorflow[and-cuda] be installed"


def gpu_findings(node: str, facts: Mapping[str, str | int]) -> Iterator[Finding]:
    """Say what TensorFlow makes of a node's GPUs, by what `Probe.gpus` answers."""
    if not facts["gpus"]:
        yield error("GPUs", f"TensorFlow on {node} sees no GPU ({facts['cuda']})", _DRIVER)
        return
    broken = [name for name in ("cudnn", "nccl") if facts.get(name)]
    for name in broken:
        shown = {"cudnn": "cuDNN", "nccl": "NCCL"}[name]
        yield error("GPUs", f"{shown} does not load on {node}: {facts[name]}", _DRIVER)
    if not broken:
        yield ok("GPUs", f"{node}: TensorFlow sees its GPUs, cuDNN and NCCL load ({facts['cuda']})")


def _silent(check: str, silent: Mapping[Node, str]) -> Iterator[Finding]:
    for node, why in silent.items():
        yield error(check, f"{node.name} does not answer: {why}", "look at its raylet's log")


def _count(nodes: Mapping[Node, object]) -> str:
    several = Counter(node.id for node in nodes)
    return f"{len(several)} node{'s' * (len(several) != 1)}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
