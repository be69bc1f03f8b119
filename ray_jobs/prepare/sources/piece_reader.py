"""Reads images that are whole files or parts of files, such as members of a tar."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from ray_jobs.data.images import BadImage
from ray_jobs.data.prefetch import prefetch_map
from ray_jobs.prepare.sources.source import ImageRefs
from ray_jobs.prepare.sources.source_files import NUM_THREADS
from ray_jobs.storage.folder import Folder

READ_BYTES = 4 << 20
"""Largest read that fetches neighbouring images together."""
GAP_BYTES = 64 << 10
"""Largest gap between neighbours; fetching that much costs less than another request."""


@dataclass
class PieceReader:
    """Reads images that are whole files or parts of files."""

    folder: Folder

    def read(self, refs: ImageRefs) -> Iterator[bytes | BadImage]:
        """Yield each image's content, or why it cannot be read, in order.

        Neighbours in a file are fetched together, and a few fetches run in advance.
        """
        with ExitStack() as files, ThreadPoolExecutor(NUM_THREADS) as threads:
            read = partial(self._read_run, _OpenFiles(self.folder, files))
            for images in prefetch_map(read, _runs(refs), threads, NUM_THREADS):
                yield from images

    def _read_run(self, opened: "_OpenFiles", run: "_Run") -> list[bytes | BadImage]:
        if run.path is None:
            return [BadImage("missing_image", "the row has no image")]
        try:
            if not run.pieces:
                return [self.folder.read_bytes(run.path)]
            first, end = run.pieces[0][0], max(start + size for start, size in run.pieces)
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
                for start, size in run.pieces
            ]
        return [bad] * max(len(run.pieces), 1)


@dataclass(frozen=True)
class _Run:
    """Images that are fetched together: one whole file, or neighbours in a file."""

    path: str | None
    pieces: list[tuple[int, int]]
    """Start and size in bytes; empty for a whole file or a row without an image."""


def _runs(refs: ImageRefs) -> Iterator[_Run]:
    run: _Run | None = None
    for row, scalar in enumerate(refs.path):
        path, piece = scalar.as_py(), None
        if path is not None and refs.start is not None and refs.size is not None:
            piece = int(refs.start[row]), int(refs.size[row])
        if run and piece and run.path == path and _is_neighbour(run, *piece):
            run.pieces.append(piece)
        else:
            if run:
                yield run
            run = _Run(path, [piece] if piece else [])
    if run:
        yield run


def _is_neighbour(run: _Run, start: int, size: int) -> bool:
    last_start, last_size = run.pieces[-1]
    # An image that several rows share is a neighbour of itself.
    is_near = last_start <= start <= last_start + last_size + GAP_BYTES
    return is_near and start + size - run.pieces[0][0] <= READ_BYTES


class _OpenFiles:
    """Keeps the last file of each thread open, since its next images often follow."""

    def __init__(self, folder: Folder, files: ExitStack) -> None:
        self._folder, self._files = folder, files
        self._last = threading.local()
        self._lock = threading.Lock()

    def read_at(self, path: str, start: int, size: int) -> bytes:
        """Return bytes of a file; fewer if it ends before."""
        if getattr(self._last, "path", None) != path:
            file = self._folder.filesystem.open_input_file(self._folder.locate(path))
            with self._lock:
                self._files.callback(file.close)
            previous = getattr(self._last, "file", None)
            self._last.path, self._last.file = path, file
            if previous is not None:
                previous.close()
        return self._last.file.read_at(size, start)
