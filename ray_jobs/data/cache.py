"""Keeps decoded row groups across epochs, as many as a declared budget holds.

A decoded row group is the stored one with pixels in place of encoded images, so whoever reads it
need not know whether it was kept. Which ones are kept follows from the manifest and the budget.

    object_store   Ray's shared memory: decoded once in the cluster, read without a copy
    disk           files on each node, mapped into memory: the node's page cache holds them
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from ray_jobs.config.spec import SPLITS, DataSpec, Split
from ray_jobs.data.manifest import Manifest

Group = tuple[Split, int, int]
"""Split, shard and row group."""
Kind = Literal["none", "object_store", "disk"]


class Cache(Protocol):
    """Decoded row groups by name."""

    def get(self, groups: Sequence[Group]) -> dict[Group, pa.Table]:
        """Return those of some row groups that are there."""
        ...

    def put(self, group: Group, table: pa.Table) -> None:
        """Keep a row group."""
        ...

    def close(self) -> None:
        """Let go of everything; for the last one who uses it on this node."""
        ...


class ObjectStoreCache:
    """Decoded row groups in Ray's object store, found through one small actor.

    Args:
        index: from `make_index`; it owns nothing but references.
    """

    def __init__(self, index: Any) -> None:
        self.index = index

    def get(self, groups: Sequence[Group]) -> dict[Group, pa.Table]:
        """Return those that are there; one whose owner died counts as absent."""
        import ray
        from ray.exceptions import RayError

        found: dict[Group, pa.Table] = {}
        try:
            refs: dict[Group, Any] = ray.get(self.index.find.remote(list(groups)))
        except RayError:
            return found
        for group, ref in refs.items():
            try:
                found[group] = _read(pa.py_buffer(ray.get(ref[0])))
            except RayError:
                continue
        return found

    def put(self, group: Group, table: pa.Table) -> None:
        """Keep a row group."""
        import ray

        # An array, and no Arrow table, since that one Ray copies.
        content = np.frombuffer(_written(table), np.uint8)
        # In a list, or Ray would hand over the content and not its reference.
        self.index.keep.remote(group, [ray.put(content)])

    def close(self) -> None:
        """Do nothing: the objects go with the index, and that with the job."""


class _Index:
    def __init__(self) -> None:
        self.refs: dict[Group, Any] = {}

    def keep(self, group: Group, ref: Any) -> None:
        # The newer one counts: the owner of the one before may have died.
        self.refs[group] = ref

    def find(self, groups: Sequence[Group]) -> dict[Group, Any]:
        return {group: self.refs[group] for group in groups if group in self.refs}


def make_index() -> Any:
    """Return the handle of a new index, an actor that takes no CPU and lives as long as the job."""
    import ray

    return ray.remote(num_cpus=0)(_Index).remote()


class DiskCache:
    """Decoded row groups as Arrow files of this node, shared by its workers and by later runs.

    Args:
        folder: for this data at this size.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, groups: Sequence[Group]) -> dict[Group, pa.Table]:
        """Return those that are there."""
        found: dict[Group, pa.Table] = {}
        for group in groups:
            try:
                found[group] = _read(pa.memory_map(str(self._path(group))))
            except OSError:
                continue
        return found

    def put(self, group: Group, table: pa.Table) -> None:
        """Keep a row group; where the disk is full it is not kept."""
        path = self._path(group)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            partial.write_bytes(_written(table))
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the files; whoever has one open goes on reading it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, group: Group) -> Path:
        return self.folder / "{}-{:05d}-{:05d}.arrow".format(*group)


def choose_kind(spec: DataSpec, manifest: Manifest, row_bytes: int, object_store: float) -> Kind:
    """Return what `data.cache` means for some data.

    Args:
        spec: with cache and budget.
        manifest: of the data.
        row_bytes: of a decoded row.
        object_store: bytes of the cluster's object stores.
    """
    if manifest.image.features:
        # There is nothing to decode.
        return "none"
    if spec.cache != "auto":
        return spec.cache
    num_rows = sum(manifest.splits[split].num_rows for split in ("train", "validation"))
    needed = num_rows * row_bytes
    stored_so = manifest.image.encoding == "raw" and row_bytes == manifest.image.row_bytes
    if not row_bytes or stored_so or needed > spec.cache_bytes:
        return "none"
    # The other half is for what flows through it.
    return "object_store" if needed <= object_store / 2 else "disk"


def kept_groups(spec: DataSpec, manifest: Manifest, row_bytes: int) -> frozenset[Group]:
    """Return the row groups of training and validation that the budget holds, first ones first."""
    kept: list[Group] = []
    left = spec.cache_bytes
    for split in SPLITS[:2]:
        for shard, info in enumerate(manifest.splits[split].shards):
            for group, num_rows in enumerate(info.row_groups):
                left -= num_rows * row_bytes
                if left < 0:
                    return frozenset(kept)
                kept.append((split, shard, group))
    return frozenset(kept)


def open_cache(kind: Kind, manifest: Manifest, size: int | None, index: Any) -> Cache | None:
    """Return the cache of a worker.

    Args:
        kind: of cache.
        manifest: of the data.
        size: side in pixels of the images in it; None for the stored size.
        index: for `object_store`.
    """
    if kind == "none":
        return None
    if kind == "object_store":
        return ObjectStoreCache(index)
    names = [shard.sha256 for split in SPLITS for shard in manifest.splits[split].shards]
    digest = hashlib.sha256(" ".join([str(size), *names]).encode()).hexdigest()[:16]
    folder = f"multimodal-ray-{os.getuid()}"
    return DiskCache(Path(tempfile.gettempdir()) / folder / digest)


def _written(table: pa.Table) -> pa.Buffer:
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def _read(source: Any) -> pa.Table:
    return pa.ipc.open_stream(source).read_all()
