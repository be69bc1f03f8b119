"""Checks that every node can use the storage, the prepared data and the weights."""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any
from uuid import uuid4

from mm_model.backbones import HUB_IMAGES, HUB_TEXTS
from mm_model.spec import ImageSpec, TextSpec
from ray_jobs.checks.finding import Finding, error, ok
from ray_jobs.checks.local import HUB_REMEDY, WEIGHTS_REMEDY, hub_problem, weights_problem
from ray_jobs.checks.probe import (
    TIMEOUT_S,
    Node,
    delete_folder,
    hash_files,
    run_on_each,
    run_on_nodes,
    unreadable_markers,
    write_marker,
)
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import MANIFEST, Manifest, Shard
from ray_jobs.storage.folder import Folder

_MIN_BYTES_PER_S = 10e6
"""Minimum rate of a node while all others read as well."""
_DRIVER = "driver"
_USE_SHARED = "use a disk that every node mounts at this path (NFS), or s3:// or gs://"
_GRANT_ACCESS = "choose another folder, or give every node permission or credentials to write there"
_SHARD_REMEDY = "prepare the data again into an empty folder, or restore the shard from a copy"
_SLOW_REMEDY = f"use storage that delivers at least {_MIN_BYTES_PER_S / 1e6:.0f} MB/s to each node"


def storage(spec: RunSpec, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Write a file from every node into the storage path and read all of them on every node."""
    path = spec.run.storage_path
    folder = Folder(path) / f".doctor-{uuid4().hex[:12]}"
    if problem := write_marker(folder, _DRIVER):
        text = f"the driver cannot write to run.storage_path={path}: {problem}"
        yield error("storage", text, _GRANT_ACCESS)
        return
    try:
        yield from _exchange_markers(path, folder, nodes)
    finally:
        delete_folder(folder)
        # A node may have its own folder at this path.
        run_on_nodes("storage", nodes, delete_folder, folder)


def _exchange_markers(path: str, folder: Folder, nodes: Sequence[Node]) -> Iterator[Finding]:
    own_markers = {node: (folder, node.key) for node in nodes}
    written, found = run_on_each("storage", own_markers, write_marker)
    for node, problem in written.items():
        if problem:
            text = f"{node.name} cannot write to run.storage_path={path}: {problem}"
            found.append(error("storage", text, _GRANT_ACCESS))
    writers = [node for node, problem in written.items() if not problem]
    markers = {_DRIVER: "the driver", **{node.key: node.name for node in writers}}
    unread, failed = run_on_nodes("storage", writers, unreadable_markers, folder, list(markers))
    missing_by_reader = {node.name: missing for node, missing in unread.items() if missing}
    if not missing_by_reader and (missing := unreadable_markers(folder, list(markers))):
        missing_by_reader["the driver"] = missing
    for reader, missing in missing_by_reader.items():
        authors = " and ".join(markers[name] for name in missing[:2])
        text = f"{reader} does not see what {authors} wrote to run.storage_path={path}"
        failed.append(error("storage", text, _USE_SHARED))
    success = ok("storage", f"every node can write to {path} and read what the others wrote")
    yield from found + failed or [success]


def data(
    spec: RunSpec, manifest: Manifest, nodes: Sequence[Node], num_shards: int
) -> Iterator[Finding]:
    """Check that every node sees the driver's manifest and can read intact shards.

    Args:
        spec: The run.
        manifest: The manifest that the driver sees.
        nodes: Nodes to check.
        num_shards: Shards that each node reads in full, different ones if there are enough.
    """
    folder = Folder(spec.data.prepared)
    (own,) = hash_files(folder, [MANIFEST])
    hashes, found = run_on_nodes("data", nodes, hash_files, folder, [MANIFEST])
    for node, [(sha, problem)] in hashes.items():
        if (sha, problem) != own:
            what = f"no manifest ({problem})" if problem else "a different manifest"
            text = f"{node.name} sees {what} in data.prepared={folder}"
            found.append(error("data", text, _USE_SHARED))
    if found or not num_shards:
        yield from found
        return
    sampled = dict(zip(nodes, sample(manifest, len(nodes), num_shards), strict=True))
    most_bytes = max((sum(s.num_bytes for s in shards) for shards in sampled.values()), default=0)
    hashes, found = run_on_each(
        "data",
        {node: (folder, [shard.path for shard in shards]) for node, shards in sampled.items()},
        hash_files,
        TIMEOUT_S + most_bytes / _MIN_BYTES_PER_S,
        late_remedy=_SLOW_REMEDY,
    )
    for node, results in hashes.items():
        for shard, (sha, problem) in zip(sampled[node], results, strict=True):
            if sha != shard.sha256:
                what = problem or "its content does not match the manifest"
                text = f"{folder}/{shard.path}, read on {node.name}: {what}"
                found.append(error("data", text, _SHARD_REMEDY))
    read = len({shard.path for shards in sampled.values() for shard in shards})
    total = sum(len(info.shards) for info in manifest.splits.values())
    success = f"{folder}: {read} of {total} shards read in full match the manifest"
    yield from found or [ok("data", success)]


def sample(manifest: Manifest, num_nodes: int, num_shards: int) -> list[list[Shard]]:
    """Return random shards for each node to read, different ones if there are enough."""
    shards = [shard for info in manifest.splits.values() for shard in info.shards]
    # Without a seed, so that repeated checks read all shards sooner or later.
    random.SystemRandom().shuffle(shards)
    stream = cycle(shards)
    return [list(islice(stream, min(num_shards, len(shards)))) for _ in range(num_nodes)]


def weights(spec: RunSpec, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Check that every node can build the backbones and read their initial weights."""
    branches: dict[str, ImageSpec | TextSpec] = {"image": spec.model.image, "text": spec.model.text}
    for name, branch in branches.items():
        if branch.kind in (*HUB_IMAGES, *HUB_TEXTS):
            setting = f"model.{name}.kind={branch.kind}"
            yield from _on_every_node(setting, HUB_REMEDY, nodes, hub_problem)
        if branch.weights and branch.kind != "none":
            # The query of a URL may contain a signature.
            setting = f"model.{name}.weights={branch.weights.partition('?')[0]}"
            arguments = (branch.weights, branch.kind)
            yield from _on_every_node(setting, WEIGHTS_REMEDY, nodes, weights_problem, *arguments)


def _on_every_node(
    setting: str, remedy: str, nodes: Sequence[Node], check: Callable[..., str], *arguments: Any
) -> Iterator[Finding]:
    answers, found = run_on_nodes("weights", nodes, check, *arguments)
    for node, problem in answers.items():
        if problem:
            found.append(error("weights", f"{setting} on {node.name}: {problem}", remedy))
    yield from found or [ok("weights", f"{setting} is available on every node")]
