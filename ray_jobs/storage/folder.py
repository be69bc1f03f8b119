"""Folders on local disk or behind a URI, through pyarrow's filesystems.

Everything that outlives a process is written here: prepared data, run folders, predictions.
pyarrow itself knows s3://, gs://, abfs://, hdfs:// and more; other schemes, such as http:// and
memory://, are fsspec's, with the packages that each of them asks for.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

_MAGIC = re.compile(r"[*?\[{]")
_QUERY = re.compile(r"\?\w+=.*$")


class Folder:
    """A folder by path or URI; names in it are relative, and may not leave it.

    Picklable, so that tasks on other nodes can be handed one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a folder; a relative path is taken from the current directory. Creates nothing.

        Raises:
            ValueError: if the URI is of a kind that neither pyarrow nor fsspec can open.
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
        # Options of the filesystem, such as ?endpoint_override=…, stay at the end.
        base, mark, options = self.uri.partition("?")
        return Folder(f"{base.rstrip('/')}/{quote(name)}{mark}{options}")

    def locate(self, name: str) -> str:
        """Return the path of a name inside this folder, for its filesystem.

        Raises:
            ValueError: if the name is absolute or climbs out of the folder.
        """
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise ValueError(f"{name!r} is no path inside {self.uri}")
        return f"{self.path}/{name}"

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a mounted disk."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def exists(self, name: str) -> bool:
        """Whether there is a file or folder of this name."""
        return self.filesystem.get_file_info(self.locate(name)).type != fs.FileType.NotFound

    def names(self, below: str = "") -> Iterator[str]:
        """Yield the names of all files in this folder, or below one inside it, in order."""
        base = self.locate(below) if below else self.path
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
        """Write a file whole or not at all: other readers see the old one or the new one."""
        path = self.locate(name)
        self.filesystem.create_dir(str(PurePosixPath(path).parent), recursive=True)
        # Object stores replace objects atomically; file systems do so by a rename.
        target = f"{path}.{os.getpid()}.partial" if self.is_local else path
        try:
            with self.filesystem.open_output_stream(target) as stream:
                stream.write(content)
            if target != path:
                os.replace(target, path)
        except BaseException:
            if target != path:
                Path(target).unlink(missing_ok=True)
            raise

    def write_text(self, name: str, text: str) -> None:
        """Write a text file whole or not at all."""
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all; NaN is refused."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def upload(self, local: str | Path, name: str) -> None:
        """Copy a local file or folder to this name."""
        local = Path(local)
        for file in [local] if local.is_file() else sorted(local.rglob("*")):
            if file.is_file():
                below = "" if file == local else f"/{file.relative_to(local).as_posix()}"
                self.write_bytes(name + below, file.read_bytes())

    def download(self, name: str, local: str | Path) -> Path:
        """Copy a file to a local path and return it."""
        local = Path(local)
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(self.read_bytes(name))
        return local

    def delete(self, name: str) -> None:
        """Remove a file or a folder with all that is in it, if it is there."""
        kind = self.filesystem.get_file_info(self.locate(name)).type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self.locate(name))
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self.locate(name))


def split_glob(location: str) -> tuple[str, str | None]:
    """Return the folder in front of a location's first wildcard or brace, and the rest.

    The rest is None where there is no wildcard, or where there is a local file or folder of this
    very name; in a URI such characters are written as %2A, %3F, %5B and %7B.
    """
    path, options = _split_options(location)
    if not _MAGIC.search(path) or ("://" not in path and Path(path).expanduser().exists()):
        return location, None
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    base = "/".join(parts[:first]) or ("/" if path.startswith("/") else ".")
    return base + options, "/".join(parts[first:])


def split_file(location: str) -> tuple[Folder, str]:
    """Return the folder of a file that is given by path or URI, and its name in that folder."""
    path, options = _split_options(location)
    parent, slash, _ = path.rpartition("/")
    name = Folder(location).path.rpartition("/")[2]
    return Folder((parent or slash or ".") + options), name


def expand_braces(pattern: str) -> list[str]:
    """Return the patterns that one with `{000..012}` or `{a,b}` stands for, in that order.

    Raises:
        ValueError: if braces hold neither.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    inner = found.group(1)
    if ends := re.fullmatch(r"([0-9]+)\.\.([0-9]+)", inner):
        first, last = ends.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{n:0{width}d}" for n in range(int(first), int(last) + step, step)]
    elif "," in inner:
        choices = inner.split(",")
    else:
        raise ValueError(
            f"{pattern!r}: braces hold a range such as {{000..012}} or a list such as {{a,b}}, not "
            f"{{{inner}}}"
        )
    rest = expand_braces(pattern[found.end() :])
    return [f"{pattern[: found.start()]}{choice}{end}" for choice in choices for end in rest]


def glob_regex(pattern: str) -> str:
    """Return a glob as a regular expression: `*` stays in one folder, `**` goes into all."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]", "": ""}
    return "".join(
        meaning[piece]
        if piece in meaning
        else piece.replace("[!", "[^")
        if piece.startswith("[")
        else re.escape(piece)
        for piece in pieces
    )


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a URI or absolute path, and the path in it."""
    # A small object is then written by one request, not by the three of an upload in parts.
    delayed = "allow_delayed_open=true" if uri.startswith("s3://") else ""
    mark = "" if not delayed else "&" if "?" in uri else "?"
    try:
        return fs.FileSystem.from_uri(f"{uri}{mark}{delayed}")
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem type" not in str(error):
            raise
    from fsspec.core import url_to_fs

    try:
        opened, path = url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{uri} cannot be opened: {error}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(opened)), path.rstrip("/")


def _split_options(location: str) -> tuple[str, str]:
    """Return a URI without its options such as `?region=x`, and these."""
    options = _QUERY.search(location) if "://" in location else None
    return (location[: options.start()], options.group()) if options else (location, "")
