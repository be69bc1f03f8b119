"""Folders on local disk or behind a URI, through pyarrow's filesystems.

Everything that outlives a process is written here: prepared data, run folders, predictions.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from pyarrow import fs


class Folder:
    """A folder by path or URI; names in it are relative, and may not leave it.

    Picklable, so that tasks on other nodes can be handed one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a folder; a relative path is taken from the current directory. Creates nothing."""
        text = os.fspath(path)
        if "://" not in text:
            text = str(Path(text).expanduser().absolute())
        self.uri = text.rstrip("/") or "/"
        self.filesystem, self.path = fs.FileSystem.from_uri(self.uri)

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "Folder":
        self.locate(name)
        return Folder(f"{self.uri}/{quote(name) if '://' in self.uri else name}")

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
