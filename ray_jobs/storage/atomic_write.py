"""Writes local files and folders under a temporary name, then renames them into place."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Suffix of the temporary files and folders, which a killed process leaves behind."""


@contextmanager
def atomic_write(target: str | Path, is_folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path that is renamed to the target on success and deleted on an error.

    Readers see the old or the new content of a file, never a mixture; a folder that is replaced is
    briefly missing. Data is not synced to disk.

    Args:
        target: File or folder to create or replace; for a file, its parent must exist.
        is_folder: Whether to create and write a folder, which only one process may do at a time.
            Its temporary name is always the same, so the next attempt deletes what a killed process
            left behind.
    """
    target = Path(target)
    process = "" if is_folder else f".{os.getpid()}"
    partial = target.with_name(f"{target.name}{process}{PARTIAL}")
    try:
        if is_folder:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        yield partial
        if is_folder:
            # A folder cannot replace a folder that is not empty.
            shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except BaseException:
        if is_folder:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise
