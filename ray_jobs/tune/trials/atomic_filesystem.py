"""Provides Ray Tune with a local file system that writes each file completely or not at all.

Tune overwrites its snapshot file by file, so a killed driver would leave a damaged one. Object
stores replace objects atomically by themselves.
"""

import io
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs

from ray_jobs.storage.atomic_write import atomic_write
from ray_jobs.storage.folder import Folder


def filesystem_of(folder: Folder) -> fs.FileSystem | None:
    """Return the file system through which Tune writes to a folder; None for Tune's default."""
    return fs.PyFileSystem(_AtomicHandler(LocalFileSystem())) if folder.is_local else None


class _AtomicHandler(fs.FSSpecHandler):
    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        return pa.PythonFile(_AtomicFile(path), mode="w")


class _AtomicFile(io.BufferedWriter):
    """A file that is renamed into place when it is closed, unless a write failed."""

    def __init__(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._replacement = ExitStack()
        partial = self._replacement.enter_context(atomic_write(path))
        super().__init__(io.FileIO(partial, "wb"))

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except BaseException:
            self._replacement.__exit__(*sys.exc_info())
            raise

    def close(self) -> None:
        if not self.closed:
            with self._replacement:
                super().close()
