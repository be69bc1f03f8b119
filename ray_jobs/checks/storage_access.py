"""Whether storage, prepared data and weights are there, seen from every node."""

import random
import uuid
from collections.abc import Iterator, Mapping, Sequence

from ray_jobs.checks.finding import Finding, error, ok
from ray_jobs.checks.local import WEIGHTS_REMEDY
from ray_jobs.checks.probe import ANSWERS_S, Node, Probe, ask, ask_each
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import NAME as MANIFEST
from ray_jobs.data.manifest import Manifest, Shard
from ray_jobs.storage.folder import Folder

_SLOWEST = 10e6
"""Bytes a second that a node reads at least, while all others read, too."""
_DRIVER = "driver"
_SHARED = "use a disk that every node mounts at this path (NFS), or s3:// or gs://"
_RIGHTS = "choose another folder, or give every node the right or the credentials to write there"


def storage(spec: RunSpec, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Write from every node into the storage path, and read from every node what others wrote."""
    here, path = Probe(), spec.run.storage_path
    folder = Folder(path) / f".doctor-{uuid.uuid4().hex[:12]}"
    problem = here.write(folder, _DRIVER)
    if problem:
        yield error("storage", f"run.storage_path={path} cannot be written: {problem}", _RIGHTS)
        return
    try:
        yield from _exchanged(path, folder, nodes)
    finally:
        here.forget(folder)
        # Where a node has a folder of its own at this path.
        ask(nodes, "forget", folder)


def _exchanged(path: str, folder: Folder, nodes: Sequence[Node]) -> Iterator[Finding]:
    written, silent = ask_each([(n, (folder, n.key)) for n in nodes], "write")
    unable = {**silent, **{node: why for node, why in written.items() if why}}
    for node, why in unable.items():
        yield error("storage", f"{node.name} cannot write run.storage_path={path}: {why}", _RIGHTS)
    able = [node for node in nodes if node not in unable]
    names = [_DRIVER, *(node.key for node in able)]
    unseen, _ = ask(able, "read", folder, names)
    shown = {_DRIVER: "the driver", **{node.key: node.name for node in nodes}}
    blind = {node: missing for node, missing in unseen.items() if missing}
    for node, missing in blind.items():
        others = " and ".join(shown[name] for name in missing[:2])
        yield error("storage", f"{node.name} does not see what {others} wrote to {path}", _SHARED)
    if unheard := Probe().read(folder, [] if blind else names):
        yield error("storage", f"the driver does not see what nodes wrote to {path}", _SHARED)
    if not unable and not blind and not unheard:
        yield ok("storage", f"{path} is written by each and read by all")


def data(
    spec: RunSpec, manifest: Manifest, nodes: Sequence[Node], num_shards: int
) -> Iterator[Finding]:
    """Check that every node sees this manifest, and some shards as it says.

    Args:
        spec: of the run.
        manifest: as the driver sees it.
        nodes: to ask.
        num_shards: that each node reads whole; others than the other nodes, where there are more.
    """
    folder = Folder(spec.data.prepared)
    (expected,) = Probe().hashes(folder, [MANIFEST])
    answers, silent = ask(nodes, "hashes", folder, [MANIFEST])
    other = {node: text for node, (text,) in answers.items() if text != expected}
    for node, text in {**silent, **other}.items():
        what = "another manifest" if _is_hash(text) else f"no manifest ({text})"
        yield error("data", f"{node.name} sees {what} in data.prepared={folder}", _SHARED)
    if silent or other:
        return
    sampled = dict(zip(nodes, sample(manifest, len(nodes), num_shards), strict=True))
    asked = [(node, (folder, [shard.path for shard in sampled[node]])) for node in nodes]
    sizes = [sum(shard.num_bytes for shard in shards) for shards in sampled.values()]
    answers, silent = ask_each(asked, "hashes", ANSWERS_S + max(sizes, default=0) / _SLOWEST)
    yield from _silent(silent)
    damaged = [
        (node, shard, text)
        for node, texts in answers.items()
        for shard, text in zip(sampled[node], texts, strict=True)
        if text != shard.sha256
    ]
    for node, shard, text in damaged:
        what = "its content is not that of the manifest" if _is_hash(text) else text
        yield error(
            "data",
            f"{folder}/{shard.path}, read on {node.name}: {what}",
            "prepare the data again into an empty folder, or bring the shard back from a copy",
        )
    if not damaged and not silent:
        read = len({shard.path for node in nodes for shard in sampled[node]})
        total = sum(len(info.shards) for info in manifest.splits.values())
        yield ok("data", f"{folder}: {read} of {total} shards read whole, as the manifest says")


def _silent(silent: Mapping[Node, str]) -> Iterator[Finding]:
    for node, why in silent.items():
        yield error(
            "data",
            f"{node.name} reads no shards: {why}",
            f"storage that brings a node less than {_SLOWEST / 1e6:.0f} MB/s is too slow to train "
            "from; or look at its raylet's log",
        )


def sample(manifest: Manifest, num_nodes: int, num_shards: int) -> list[list[Shard]]:
    """Return shards for each node to read: as many different ones as there are."""
    shards = [shard for info in manifest.splits.values() for shard in info.shards]
    # Those of another day are others, so that in time all of them are read.
    random.SystemRandom().shuffle(shards)
    if not shards:
        return [[] for _ in range(num_nodes)]
    count = min(num_shards, len(shards))
    return [
        [shards[(node * count + i) % len(shards)] for i in range(count)]
        for node in range(num_nodes)
    ]


def weights(spec: RunSpec, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check that every node can read the weights that the image branch starts with."""
    image = spec.model.image
    if not image.weights or image.kind == "none":
        return
    answers, silent = ask(nodes, "weights_problem", image.weights, image.kind)
    shown = image.weights.partition("?")[0]  # what follows may be a signature
    lacking = {**silent, **{node: why for node, why in answers.items() if why}}
    for node, why in lacking.items():
        text = f"model.image.weights={shown} on {node.name}: {why}"
        yield error("weights", text, WEIGHTS_REMEDY)
    if not lacking:
        yield ok("weights", f"model.image.weights={shown} is there for every node")


def _is_hash(text: str) -> bool:
    return len(text) == 64 and " " not in text
