"""Keeps decoded row groups across epochs, within a byte budget.

A decoded row group has pixels instead of encoded images; readers handle both alike. Only the
manifest and the budget determine which row groups are kept.

    object_store   Ray's shared memory: decoded once per cluster, read without a copy
    disk           memory-mapped files on each node, which its page cache keeps in memory
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import pyarrow as pa

from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.config.spec import DataSpec
from ray_jobs.data.manifest import Manifest
from ray_jobs.storage.atomic_write import atomic_write

Group = tuple[str, int, int]
"""Split or, for selected rows, split and hash of the selection; shard and row group."""
Kind = Literal["none", "object_store", "disk"]


class ObjectStoreCache:
    """Decoded row groups in Ray's object store, found through an index actor."""

    def __init__(self, index: Any) -> None:
        self.index = index

    def get(self, groups: Sequence[Group]) -> dict[Group, pa.Table]:
        """Return those of some row groups that are cached; skip objects whose owner died."""
        import ray
        from ray.exceptions import RayError

        tables: dict[Group, pa.Table] = {}
        with suppress(RayError):
            refs: dict[Group, Any] = ray.get(self.index.find.remote(list(groups)))
            for group, ref in refs.items():
                with suppress(RayError):
                    tables[group] = _deserialize(pa.py_buffer(ray.get(ref[0])))
        return tables

    def put(self, group: Group, table: pa.Table) -> None:
        """Cache a row group."""
        import ray

        # As a NumPy array, because Ray copies Arrow tables.
        content = np.frombuffer(_serialize(table), np.uint8)
        # In a list, because Ray would pass the content of a bare reference.
        self.index.keep.remote(group, [ray.put(content)])

    def close(self) -> None:
        """Do nothing: the objects are freed with the index, which ends with the job."""


class _Index:
    def __init__(self) -> None:
        self.refs: dict[Group, Any] = {}

    def keep(self, group: Group, ref: Any) -> None:
        # Replaces an earlier object, whose owner may have died.
        self.refs[group] = ref

    def find(self, groups: Sequence[Group]) -> dict[Group, Any]:
        return {group: self.refs[group] for group in groups if group in self.refs}


def make_cache_index() -> Any:
    """Return the handle of a new index actor, which needs no CPU and lives as long as the job."""
    import ray

    return ray.remote(num_cpus=0)(_Index).remote()


class DiskCache:
    """Decoded row groups as Arrow files, shared by all processes of a node that use the same data.

    Each process holds a shared lock on a file next to the folder. The last one to close deletes the
    folder. The next run on the node deletes the folders that killed processes left behind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        for name in {path.stem for path in folder.parent.iterdir()} - {folder.name}:
            _delete_unused(folder.with_name(name))
        self._lock = _lock(folder, fcntl.LOCK_SH)
        folder.mkdir(exist_ok=True)

    def get(self, groups: Sequence[Group]) -> dict[Group, pa.Table]:
        """Return those of some row groups that are cached."""
        tables: dict[Group, pa.Table] = {}
        for group in groups:
            with suppress(OSError):
                tables[group] = _deserialize(pa.memory_map(str(self._path(group))))
        return tables

    def put(self, group: Group, table: pa.Table) -> None:
        """Cache a row group unless the disk is full."""
        with suppress(OSError), atomic_write(self._path(group)) as partial:
            partial.write_bytes(_serialize(table))

    def close(self) -> None:
        """Stop using the folder, and delete it if no other process uses it."""
        self._lock.close()
        _delete_unused(self.folder)

    def _path(self, group: Group) -> Path:
        return self.folder / "{}-{:05d}-{:05d}.arrow".format(*group)


Cache = ObjectStoreCache | DiskCache


def _lock(folder: Path, mode: int) -> IO[str]:
    """Return the open lock file of a cache folder; closing it releases the lock.

    Raises:
        BlockingIOError: If `mode` includes LOCK_NB and another process holds the lock.
    """
    path = folder.with_suffix(".lock")
    while True:
        with ExitStack() as stack:
            file = stack.enter_context(path.open("a"))
            fcntl.flock(file, mode)
            # Between open and flock, another process may have deleted the folder and the lock file.
            with suppress(FileNotFoundError):
                if os.path.samefile(file.fileno(), path):
                    stack.pop_all()
                    return file


def _delete_unused(folder: Path) -> None:
    """Delete a cache folder and its lock file unless a process uses it."""
    with suppress(OSError), _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink()


def choose_cache(spec: DataSpec, manifest: Manifest, row_bytes: int, object_store: float) -> Kind:
    """Return the kind of cache for some data; resolve `data.cache: auto`.

    Args:
        spec: The `data` section.
        manifest: The manifest of the prepared data.
        row_bytes: Bytes of a decoded row.
        object_store: Bytes of the cluster's object stores.
    """
    if manifest.image.features:
        return "none"  # Features need no decoding.
    if spec.cache != "auto":
        return spec.cache
    num_rows = sum(manifest.splits[split].num_rows for split in ("train", "validation"))
    needed = num_rows * row_bytes
    is_decoded = manifest.image.encoding == "raw" and row_bytes == manifest.image.row_bytes
    if not row_bytes or is_decoded or needed > spec.cache_bytes:
        return "none"
    # The other half of the object store is for data in transit.
    return "object_store" if needed <= object_store / 2 else "disk"


def cacheable_groups(spec: DataSpec, manifest: Manifest, row_bytes: int) -> frozenset[Group]:
    """Return the first row groups of training and validation, as many as fit in the budget."""
    groups: list[Group] = []
    left = spec.cache_bytes
    for split in SPLITS[:2]:
        for shard, info in enumerate(manifest.splits[split].shards):
            for group, num_rows in enumerate(info.row_groups):
                left -= num_rows * row_bytes
                if left < 0:
                    return frozenset(groups)
                groups.append((split, shard, group))
    return frozenset(groups)


def open_cache(kind: Kind, manifest: Manifest, size: int | None, index: Any) -> Cache | None:
    """Return the cache of a worker, or None for the kind `none`.

    Args:
        kind: Kind of the cache.
        manifest: The manifest of the prepared data.
        size: Side in pixels of the model's images; None for the stored size.
        index: Index actor from `make_cache_index`, which only an `object_store` cache needs.
    """
    if kind == "none":
        return None
    if kind == "object_store":
        return ObjectStoreCache(index)
    shards = [shard for split in SPLITS for shard in manifest.splits[split].shards]
    names = [f"{shard.sha256}{shard.selection}" for shard in shards]
    digest = hashlib.sha256(" ".join([str(size), *names]).encode()).hexdigest()[:16]
    return DiskCache(Path(tempfile.gettempdir()) / f"multimodal-ray-{os.getuid()}" / digest)


def _serialize(table: pa.Table) -> pa.Buffer:
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def _deserialize(source: Any) -> pa.Table:
    return pa.ipc.open_stream(source).read_all()
