"""Resolves `prepare.images`, a path or URI that may have wildcards, to a folder and its files.

All listings skip what programs and operating systems leave behind (`.ipynb_checkpoints`, `._x.jpg`,
`__MACOSX`, `Thumbs.db`), unless a glob names it. On local disks, each folder is listed once, also
if links lead to it.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TypeVar

from pyarrow import fs

from ray_jobs.config.errors import JobError
from ray_jobs.config.text import count_text
from ray_jobs.data.prefetch import prefetch_map
from ray_jobs.storage.folder import Folder, expand_braces, glob_regex, split_file, split_glob

NUM_THREADS = 8
"""Number of files to index or read at once; threads mostly wait for storage."""
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".avif",
    ".ppm", ".pgm", ".dcm", ".dicom",
)  # fmt: skip
_LITTER = ("__macosx", "thumbs.db", "desktop.ini")

T = TypeVar("T")
R = TypeVar("R")


def open_location(location: str) -> tuple[Folder, list[str]]:
    """Return the folder of `prepare.images`, and the patterns of its files if it is a glob."""
    try:
        base, pattern = split_glob(location)
        return Folder(base), expand_braces(pattern) if pattern else []
    except ValueError as error:
        raise JobError(f"prepare.images={location!r}: {error}") from error


def require_folder(folder: Folder, location: str) -> None:
    """Check that the folder of `prepare.images` exists."""
    if folder.filesystem.get_file_info(folder.path).type != fs.FileType.Directory:
        raise JobError(f"prepare.images={location!r}: there is no folder {folder}")


@dataclass
class Walk:
    """Lists the files in a folder and its subfolders.

    Args:
        folder: The folder.
        patterns: Globs of the wanted files; hidden names are listed only if one names them.
    """

    folder: Folder
    patterns: Sequence[str] = ()
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Names that were skipped although they may be images, by reason."""

    def __post_init__(self) -> None:
        parts = [part for pattern in self.patterns for part in pattern.split("/")]
        self._shown = [part for part in parts if _is_hidden(part)]
        self._matches = [re.compile(glob_regex(each)).fullmatch for each in self.patterns]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was skipped, with an example each."""
        return tuple(
            f"skipped {count_text(len(names), 'name')} ({reason}), such as {names[0]}"
            for reason, names in self.skipped.items()
        )

    def names(self) -> list[str]:
        """Return the files in order: by pattern, then by name."""
        if self.folder.is_local:
            names = sorted(name for level in self.levels() for name in level)
        else:
            # Object stores list folders with all their subfolders in few requests.
            names = [n for n in self.folder.names() if not any(map(self._skips, n.split("/")))]
        if not self._matches:
            return names
        return list(dict.fromkeys(n for match in self._matches for n in names if match(n)))

    def levels(self, max_folders: int | None = None) -> Iterator[list[str]]:
        """Yield the files of each level of subfolders, of up to `max_folders` folders per level."""
        level, links = [""], []
        seen: set[tuple[int, int]] = set()
        while level or links:
            if not level:
                # After all other folders, so that a link to one of them repeats nothing.
                level, links = links, []
            found: dict[str, list[str]] = {"file": [], "folder": [], "link": links}
            for parent in sorted(level)[:max_folders]:
                is_local = self.folder.is_local
                for name, kind in (
                    self._list_local(parent, seen) if is_local else self._list_remote(parent)
                ):
                    found[kind].append(name)
            files = sorted(found["file"])
            yield [n for n in files if any(m(n) for m in self._matches)] if self._matches else files
            level = found["folder"]

    def _list_local(self, parent: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, str]]:
        """Yield the names in a folder and their kinds."""
        path = os.path.join(self.folder.path, parent)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                self._skip("link to a folder that is listed", parent)
                return
            seen.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(path))
        except OSError as error:
            if not parent:
                raise JobError(f"prepare.images: {self.folder} cannot be read: {error}") from error
            self._skip("unreadable", parent)
            return
        for entry in entries:
            name = f"{parent}/{entry.name}" if parent else entry.name
            if self._skips(entry.name):
                continue
            try:
                name.encode()
            except UnicodeEncodeError:
                self._skip("not UTF-8", repr(os.fsencode(name))[1:])
                continue
            if entry.is_file(follow_symlinks=False):
                # Most entries are; the checks below take longer.
                yield name, "file"
                continue
            is_link = entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                yield name, "link" if is_link else "folder"
            elif is_link and os.path.isfile(entry.path):
                yield name, "file"
            elif is_link:
                self._skip("broken link", name)

    def _list_remote(self, parent: str) -> Iterator[tuple[str, str]]:
        filesystem, path = self.folder.filesystem, self.folder.path
        below = f"{path}/{parent}" if parent else path
        for info in filesystem.get_file_info(fs.FileSelector(below)):
            if not self._skips(info.base_name):
                kind = "folder" if info.type == fs.FileType.Directory else "file"
                yield info.path.removeprefix(path).lstrip("/"), kind

    def _skips(self, base: str) -> bool:
        return _is_hidden(base) and not any(fnmatchcase(base, shown) for shown in self._shown)

    def _skip(self, reason: str, name: str) -> None:
        self.skipped.setdefault(reason, []).append(name)


def find_files(
    location: str, is_kind: Callable[[str], bool], kind_name: str
) -> tuple[Folder, list[str], tuple[str, ...]]:
    """Return the folder of a location, its files of one kind in order, and notes on the listing.

    Args:
        location: A file, a folder, or either with wildcards and braces; path or URI.
        is_kind: Returns whether a file in a folder is of the kind, by its name. Not applied to
            files that the location names or matches by a glob.
        kind_name: Name of the kind for error messages.

    Raises:
        JobError: If there are no files, or a named file is missing.
    """
    folder, patterns = open_location(location)
    walk = Walk(folder, patterns)
    if not patterns:
        kind = folder.filesystem.get_file_info(folder.path).type
        if kind == fs.FileType.NotFound:
            raise JobError(f"prepare.images={location!r}: there is no such file or folder")
        if kind != fs.FileType.Directory:
            parent, name = split_file(location)
            return parent, [name], ()
        # Spark and Delta Lake keep files such as _SUCCESS and _delta_log/0.parquet.
        names = [name for name in walk.names() if is_kind(name) and not has_underscore(name)]
    elif any(re.search(r"[*?\[]", each) for each in patterns):
        names = walk.names()
    else:
        names = list(dict.fromkeys(patterns))
        infos = folder.filesystem.get_file_info([folder.locate(name) for name in names])
        missing = [n for n, i in zip(names, infos, strict=True) if i.type == fs.FileType.NotFound]
        if missing:
            raise JobError(
                f"prepare.images={location!r}: {len(missing)} of {count_text(len(names), 'file')} "
                f"missing, the first is {missing[0]}; add the files or correct the path"
            )
    if not names:
        raise JobError(f"prepare.images={location!r}: there are no {kind_name}")
    return folder, names, walk.notes


def map_in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return the results in the items' order; the first error is raised."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(prefetch_map(function, items, threads, NUM_THREADS))


def has_underscore(name: str) -> bool:
    """Return whether a file or one of its folders is private to a writer such as Spark."""
    return any(part.startswith("_") for part in PurePosixPath(name).parts)


def _is_hidden(base: str) -> bool:
    return base.startswith(".") or base.lower() in _LITTER
