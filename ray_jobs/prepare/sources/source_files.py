"""Resolves `prepare.images`, a path or URI that may have wildcards, to a folder and its files."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import TypeVar

from pyarrow import fs

from ray_jobs.config.errors import JobError
from ray_jobs.config.text import count_text
from ray_jobs.data.prefetch import prefetch_map
from ray_jobs.storage.folder import Folder, expand_braces, glob_regex, split_file, split_glob

NUM_THREADS = 8
"""Number of files to index or read at once; threads mostly wait for storage."""

T = TypeVar("T")
R = TypeVar("R")


def open_folder(location: str) -> Folder:
    """Open `prepare.images`, which must be an existing folder."""
    folder = Folder(location)
    if folder.filesystem.get_file_info(folder.path).type != fs.FileType.Directory:
        raise JobError(f"prepare.images={location!r}: there is no folder {folder}")
    return folder


def find_files(
    location: str, is_kind: Callable[[str], bool], kind_name: str
) -> tuple[Folder, list[str]]:
    """Return the folder of a location, and its files of one kind in order.

    Args:
        location: A file, a folder, or either with wildcards and braces; path or URI.
        is_kind: Returns whether a file in a folder is of the kind, by its name. Not applied to
            files that the location names or matches by a glob.
        kind_name: Name of the kind for error messages.

    Raises:
        JobError: If there are no files, or a named file is missing.
    """
    try:
        base, pattern = split_glob(location)
        patterns = expand_braces(pattern) if pattern else []
        folder = Folder(base)
    except ValueError as error:
        raise JobError(f"prepare.images={location!r}: {error}") from error
    if pattern is None:
        kind = folder.filesystem.get_file_info(folder.path).type
        if kind == fs.FileType.NotFound:
            raise JobError(f"prepare.images={location!r}: there is no such file or folder")
        if kind != fs.FileType.Directory:
            parent, name = split_file(location)
            return parent, [name]
        names = [name for name in folder.names() if is_kind(name) and not _is_hidden(name)]
    elif any(re.search(r"[*?\[]", each) for each in patterns):
        listed = list(folder.names())
        matches = [re.compile(glob_regex(each)).fullmatch for each in patterns]
        names = [name for match in matches for name in listed if match(name)]
    else:
        names = patterns
        infos = folder.filesystem.get_file_info([folder.locate(name) for name in names])
        missing = [n for n, i in zip(names, infos, strict=True) if i.type == fs.FileType.NotFound]
        if missing:
            raise JobError(
                f"prepare.images={location!r}: {len(missing)} of {count_text(len(names), 'file')} "
                f"missing, the first is {missing[0]}; add the files or correct the path"
            )
    if not names:
        raise JobError(f"prepare.images={location!r}: there are no {kind_name}")
    return folder, list(dict.fromkeys(names))


def map_in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return the results in the items' order; the first error is raised."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(prefetch_map(function, items, threads, NUM_THREADS))


def _is_hidden(name: str) -> bool:
    return PurePosixPath(name).name.startswith((".", "_"))
