"""A local file system for Ray Tune on which a file is there whole or not at all.

Tune copies its snapshots over the earlier ones, file by file; a driver that is killed meanwhile
would leave one that cannot be read. Object stores replace objects as a whole by themselves.
"""

import io
import os
from typing import Any

import fsspec.implementations.local
from pyarrow import fs

from ray_jobs.storage.folder import Folder


def filesystem_of(folder: Folder) -> fs.FileSystem | None:
    """Return what Tune is to write a folder through; None for its own choice."""
    if not folder.is_local:
        return None
    return fs.PyFileSystem(fs.FSSpecHandler(_WholeFiles()))


class _WholeFiles(fsspec.implementations.local.LocalFileSystem):
    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any
    ) -> Any:
        if mode == "wb":
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return _WholeFile(path)
        return super()._open(path, mode, block_size, **options)


class _WholeFile(io.FileIO):
    """A file that gets its name when it is closed, if all of it could be written."""

    def __init__(self, path: str) -> None:
        self.path, self.partial, self.is_whole = path, f"{path}.{os.getpid()}.partial", True
        super().__init__(self.partial, "wb")

    def write(self, content: Any, /) -> int:
        try:
            view, written = memoryview(content).cast("B"), 0
            while written < len(view):
                written += super().write(view[written:]) or 0
            return written
        except BaseException:
            self.is_whole = False
            raise

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        if self.is_whole:
            os.replace(self.partial, self.path)
        else:
            os.unlink(self.partial)
