"""Reads the images that requests name, in the folders that the server's owner has allowed."""

import os
from collections.abc import Sequence

from pyarrow import fs

from ray_jobs.config.errors import JobError
from ray_jobs.data.images import BadImage
from ray_jobs.storage.folder import Folder


class ImageFolders:
    """The folders, by the beginning of the paths or URIs of their images.

    Args:
        folders: Local paths, or URIs of object storage.
        max_bytes: Maximum size of an image file.

    Raises:
        JobError: If a folder is a web address, whose server could redirect to any other address, or
            cannot be opened.
    """

    def __init__(self, folders: Sequence[str], max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._folders: dict[str, Folder] = {}
        for folder in folders:
            if folder.lower().startswith(("http:", "https:")):
                raise JobError(
                    f"--image_folders names the web address {folder}; requests may name images in "
                    "local folders and object storage only"
                )
            # Without the options of its file system, such as an endpoint.
            prefix = folder.partition("?")[0] if "://" in folder else folder
            try:
                self._folders[f"{prefix.rstrip('/')}/"] = Folder(folder)
            except (OSError, ValueError) as error:
                raise JobError(f"--image_folders: {error}") from error

    def __contains__(self, uri: str) -> bool:
        """Whether a text is a path or URI in one of the folders."""
        return self._split(uri) is not None

    def read(self, uri: str) -> bytes | BadImage:
        """Return an image file, or why it cannot be read."""
        found = self._split(uri)
        if found is None:
            return BadImage("missing_image", "it is in none of the folders of --image_folders")
        folder, name = found
        try:
            path = folder.locate(name)
            if folder.is_local and not _is_inside(path, folder.path):
                return BadImage("missing_image", "it is a link out of its folder")
            (info,) = folder.filesystem.get_file_info([path])
            if info.type != fs.FileType.File:
                return BadImage("missing_image", "there is no such file")
            if info.size is None or info.size > self.max_bytes:
                return BadImage("too_large_image", f"the file has {info.size} bytes")
            return folder.read_bytes(name)
        except (OSError, ValueError):
            return BadImage("missing_image", "the file cannot be read")

    def _split(self, uri: str) -> tuple[Folder, str] | None:
        """Return the folder of an image and its path in it."""
        for prefix, folder in self._folders.items():
            name = uri.removeprefix(prefix)
            # Options of a file system must not come from a request.
            refused = "\\\0" if folder.is_local else "?#\\\0"
            if name not in (uri, "") and not set(name) & set(refused) and _is_plain(name):
                return folder, name
        return None


def _is_plain(name: str) -> bool:
    return not {"", ".", ".."} & set(name.split("/"))


def _is_inside(path: str, folder: str) -> bool:
    root = os.path.realpath(folder)
    return os.path.commonpath([root, os.path.realpath(path)]) == root
