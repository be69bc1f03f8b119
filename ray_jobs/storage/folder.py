"""Reads and writes folders on local disks and in object stores, through pyarrow's file systems.

pyarrow itself supports s3://, gs://, abfs://, hdfs:// and more. Other schemes, such as http:// and
memory://, use fsspec and the packages that it requires for each scheme.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ray_jobs.storage.atomic_write import atomic_write

_MAGIC = re.compile(r"[*?\[{]")
_QUERY = re.compile(r"\?\w+=.*$")


class Folder:
    """A folder, given by path or URI, whose files have names relative to it.

    It is picklable, so it can be passed to tasks on other nodes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a folder without creating it; a relative path refers to the current directory.

        Raises:
            ValueError: If neither pyarrow nor fsspec supports the scheme of the URI.
        """
        text = os.fspath(path)
        if "://" not in text:
            text = str(Path(text).expanduser().absolute())
        self.uri = text.rstrip("/") or "/"
        self.filesystem, self.path = _open(self.uri)

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "Folder":
        self.locate(name)
        if "://" not in self.uri or isinstance(self.filesystem, fs.PyFileSystem):
            return Folder(f"{self.uri}/{name}")
        # Options of the file system, such as ?endpoint_override=…, must stay at the end.
        base, mark, options = self.uri.partition("?")
        return Folder(f"{base.rstrip('/')}/{quote(name)}{mark}{options}")

    def locate(self, name: str) -> str:
        """Return the path of a name in this folder for `self.filesystem`.

        Raises:
            ValueError: If the name is absolute or outside the folder.
        """
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise ValueError(f"{name!r} is not a path inside {self.uri}")
        return f"{self.path}/{name}"

    @property
    def is_local(self) -> bool:
        """Whether the folder is in the local file system."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def exists(self, name: str) -> bool:
        """Whether a file or folder with this name exists."""
        return self.filesystem.get_file_info(self.locate(name)).type != fs.FileType.NotFound

    def has_file(self, name: str, num_bytes: int) -> bool:
        """Whether a file with this name and size exists."""
        info = self.filesystem.get_file_info(self.locate(name))
        return info.type == fs.FileType.File and info.size == num_bytes

    def names(self, subfolder: str = "") -> Iterator[str]:
        """Yield the sorted names of all files in this folder or one of its subfolders."""
        base = self.locate(subfolder) if subfolder else self.path
        selector = fs.FileSelector(base, recursive=True, allow_not_found=True)
        for info in sorted(self.filesystem.get_file_info(selector), key=lambda i: i.path):
            if info.type == fs.FileType.File:
                yield info.path.removeprefix(self.path).lstrip("/")

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file."""
        with self.filesystem.open_input_stream(self.locate(name)) as stream:
            return stream.read()

    def read_json(self, name: str) -> Any:
        """Return the value in a JSON file."""
        return json.loads(self.read_bytes(name))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a file atomically: readers see the old or the new content."""
        path = self.locate(name)
        self.filesystem.create_dir(str(PurePosixPath(path).parent), recursive=True)
        if self.is_local:
            with atomic_write(path) as partial:
                partial.write_bytes(content)
        else:
            # Object stores replace objects atomically.
            with self.filesystem.open_output_stream(path) as stream:
                stream.write(content)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically.

        Raises:
            ValueError: If the value contains NaN or infinity.
        """
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_parquet(self, name: str) -> pa.Table:
        """Return the rows of a small Parquet file, read as a whole."""
        return pq.read_table(pa.BufferReader(self.read_bytes(name)))

    def write_parquet(self, name: str, table: pa.Table) -> None:
        """Write a small Parquet file atomically."""
        stream = pa.BufferOutputStream()
        pq.write_table(table, stream)
        self.write_bytes(name, stream.getvalue().to_pybytes())

    def upload(self, local: str | Path, name: str) -> None:
        """Copy a local file or folder to this name."""
        local = Path(local)
        for file in [local] if local.is_file() else sorted(local.rglob("*")):
            if file.is_file():
                relative = file.relative_to(local).as_posix()
                self.write_bytes(name if file == local else f"{name}/{relative}", file.read_bytes())

    def download(self, name: str, local: str | Path) -> Path:
        """Copy a file to a local path, and return the path."""
        local = Path(local)
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(self.read_bytes(name))
        return local

    def delete(self, name: str) -> None:
        """Delete a file or a folder with its content, if it exists."""
        kind = self.filesystem.get_file_info(self.locate(name)).type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self.locate(name))
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self.locate(name))


def split_glob(location: str) -> tuple[str, str | None]:
    """Split a location before its first wildcard or brace into a folder and a pattern.

    The pattern is None if there is no wildcard, or if a local file or folder has exactly this name.
    In a URI, %2A, %3F, %5B and %7B stand for literal characters.
    """
    path, options = _split_options(location)
    if not _MAGIC.search(path) or ("://" not in path and Path(path).expanduser().exists()):
        return location, None
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    base = "/".join(parts[:first]) or ("/" if path.startswith("/") else ".")
    return base + options, "/".join(parts[first:])


def split_file(location: str) -> tuple[Folder, str]:
    """Return the folder of a file, given by path or URI, and its name in that folder."""
    path, options = _split_options(location)
    parent, slash, _ = path.rpartition("/")
    name = Folder(location).path.rpartition("/")[2]
    return Folder((parent or slash or ".") + options), name


def expand_braces(pattern: str) -> list[str]:
    """Expand braces such as `{000..012}` or `{a,b}` in a pattern, in order.

    Raises:
        ValueError: If braces contain neither a range nor a list.
    """
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    inner = braces.group(1)
    if ends := re.fullmatch(r"([0-9]+)\.\.([0-9]+)", inner):
        first, last = ends.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{n:0{width}d}" for n in range(int(first), int(last) + step, step)]
    elif "," in inner:
        choices = inner.split(",")
    else:
        raise ValueError(
            f"{pattern!r}: braces must contain a range such as {{000..012}} or a list such as "
            f"{{a,b}}, not {{{inner}}}"
        )
    rest = expand_braces(pattern[braces.end() :])
    return [f"{pattern[: braces.start()]}{choice}{end}" for choice in choices for end in rest]


def glob_regex(pattern: str) -> str:
    """Return the regular expression for a glob: `*` matches in a folder, `**` across folders."""
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def translate(token: str) -> str:
        if token.startswith("["):
            return token.replace("[!", "[^")
        return wildcards.get(token) or re.escape(token)

    return "".join(map(translate, re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)))


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a URI or absolute path, and the path in it."""
    # With this option, a small object needs one request instead of three for a multipart upload.
    delayed = "allow_delayed_open=true" if uri.startswith("s3://") else ""
    mark = "" if not delayed else "&" if "?" in uri else "?"
    try:
        return fs.FileSystem.from_uri(f"{uri}{mark}{delayed}")
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise ValueError(f"could not open {uri}: {error}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path.rstrip("/")


def _split_options(location: str) -> tuple[str, str]:
    """Split a URI into the part before its options, such as `?region=x`, and the options."""
    options = _QUERY.search(location) if "://" in location else None
    return (location[: options.start()], options.group()) if options else (location, "")
