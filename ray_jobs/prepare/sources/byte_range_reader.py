"""Reads images that are whole files or byte ranges of files, such as members of a tar."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from ray_jobs.data.images import BadImage
from ray_jobs.data.prefetch import prefetch_map
from ray_jobs.prepare.sources.source import ImageRefs
from ray_jobs.prepare.sources.source_files import NUM_THREADS
from ray_jobs.storage.folder import Folder

READ_BYTES = 4 << 20
"""Maximum size of a read that fetches neighbouring images together."""
GAP_BYTES = 64 << 10
"""Maximum gap between neighbours; fetching that much costs less than another request."""


@dataclass
class ByteRangeReader:
    """Reads images that are whole files or byte ranges of files."""

    folder: Folder

    def read(self, refs: ImageRefs) -> Iterator[bytes | BadImage]:
        """Yield each image's content, or why it cannot be read, in order.

        Neighbours in a file are fetched together, and a few fetches run in advance.
        """
        with (
            closing(_OpenFiles(self.folder)) as opened,
            ThreadPoolExecutor(NUM_THREADS) as threads,
        ):
            read = partial(self._read_run, opened)
            for images in prefetch_map(read, _runs(refs), threads, NUM_THREADS):
                yield from images

    def _read_run(self, opened: "_OpenFiles", run: "_Run") -> list[bytes | BadImage]:
        if run.path is None:
            return [BadImage("missing_image", "the row has no image")]
        try:
            if not run.ranges:
                return [self.folder.read_bytes(run.path)]
            first, end = run.ranges[0][0], max(start + size for start, size in run.ranges)
            content = opened.read_at(run.path, first, end - first)
        except FileNotFoundError:
            bad = BadImage("missing_image", f"no such file in {self.folder}")
        # Clients of remote filesystems have no common error class.
        except Exception as error:
            bad = BadImage("unreadable_file", str(error))
        else:
            return [
                content[start - first : start - first + size]
                if start - first + size <= len(content)
                else BadImage("unreadable_file", f"the file ends before byte {start + size}")
                for start, size in run.ranges
            ]
        return [bad] * max(len(run.ranges), 1)


@dataclass(frozen=True)
class _Run:
    """Images that are fetched together: one whole file, or neighbours in a file."""

    path: str | None
    ranges: list[tuple[int, int]]
    """Start and size in bytes; empty for a whole file or a row without an image."""


def _runs(refs: ImageRefs) -> Iterator[_Run]:
    run: _Run | None = None
    for row, scalar in enumerate(refs.path):
        path, byte_range = scalar.as_py(), None
        if path is not None and refs.start is not None and refs.size is not None:
            byte_range = int(refs.start[row]), int(refs.size[row])
        if run and byte_range and run.path == path and _is_neighbour(run, *byte_range):
            run.ranges.append(byte_range)
        else:
            if run:
                yield run
            run = _Run(path, [byte_range] if byte_range else [])
    if run:
        yield run


def _is_neighbour(run: _Run, start: int, size: int) -> bool:
    last_start, last_size = run.ranges[-1]
    # An image that several rows share is a neighbour of itself.
    is_near = last_start <= start <= last_start + last_size + GAP_BYTES
    return is_near and start + size - run.ranges[0][0] <= READ_BYTES


class _OpenFiles:
    """Keeps the last file of each thread open, since the next images are often in it."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._last: dict[int, tuple[str, pa.NativeFile]] = {}

    def read_at(self, path: str, start: int, size: int) -> bytes:
        """Return `size` bytes of a file from `start`, or fewer if the file ends before."""
        thread = threading.get_ident()
        last_path, file = self._last.get(thread, (None, None))
        if file is None or last_path != path:
            previous = file
            file = self._folder.filesystem.open_input_file(self._folder.locate(path))
            self._last[thread] = path, file
            if previous is not None:
                previous.close()
        return file.read_at(size, start)

    def close(self) -> None:
        """Close the last file of each thread."""
        for _, file in self._last.values():
            file.close()
