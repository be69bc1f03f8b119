"""Where the images are: a folder, a glob or a URI → the file of each row.

Imports neither Ray nor TensorFlow.
"""

import re
from pathlib import PurePosixPath

from pyarrow import fs

from ray_jobs.cli import JobError
from ray_jobs.images import BadImage
from ray_jobs.storage import Folder

_MAGIC = re.compile(r"[*?\[]")


class ImageSource:
    """The images below a folder, or those that a glob such as `photos/**/*.jpg` finds.

    Args:
        location: folder, glob or URI of either.

    Raises:
        JobError: if there is no such folder, or the glob finds nothing.
    """

    def __init__(self, location: str) -> None:
        if not location:
            raise JobError("prepare.images is not set: give the folder, glob or URI of the images")
        base, pattern = _split_glob(location)
        self.folder = Folder(base)
        if not _is_folder(self.folder):
            raise JobError(f"prepare.images={location!r}: there is no folder {self.folder}")
        self._by_name: dict[str, list[str]] | None = None
        if pattern:
            matches = re.compile(_glob_regex(pattern)).fullmatch
            self._by_name = {}
            for path in filter(matches, self.folder.names()):
                self._by_name.setdefault(PurePosixPath(path).name, []).append(path)
            if not self._by_name:
                raise JobError(f"prepare.images={location!r} finds no file")

    def find(self, path: str) -> str:
        """Return the path below `folder` of a row's image.

        Args:
            path: below the folder, by URI or absolute inside it; in a glob's findings also the
                file's name alone, or the end of its path.

        Raises:
            BadImage: `image_outside_folder`, `missing_image` or `ambiguous_image`. Whether there
                is such a file in a folder shows only when it is read.
        """
        for prefix in (self.folder.uri, self.folder.path):
            path = path.removeprefix(f"{prefix.rstrip('/')}/")
        try:
            self.folder.locate(path)
        except ValueError as error:
            raise BadImage("image_outside_folder", str(error)) from None
        if self._by_name is None:
            return path
        path = str(PurePosixPath(path))
        found = [
            file
            for file in self._by_name.get(PurePosixPath(path).name, [])
            if file == path or file.endswith(f"/{path}")
        ]
        if not found:
            raise BadImage("missing_image", f"the glob finds no {path}")
        if len(found) > 1:
            raise BadImage("ambiguous_image", f"{path} may be {found[0]} or {found[1]}")
        return found[0]


def read_image(folder: Folder, path: str) -> bytes:
    """Return the content of an image file.

    Raises:
        BadImage: `missing_image`, or `unreadable_file` where there is one.
    """
    try:
        return folder.read_bytes(path)
    except FileNotFoundError:
        raise BadImage("missing_image", f"no such file in {folder}") from None
    except OSError as error:
        raise BadImage("unreadable_file", str(error)) from error


def _is_folder(folder: Folder) -> bool:
    return folder.filesystem.get_file_info(folder.path).type == fs.FileType.Directory


def _split_glob(location: str) -> tuple[str, str | None]:
    """Return the folder in front of a glob's first wildcard, and the rest; none for a folder."""
    if not _MAGIC.search(location) or _is_folder(Folder(location)):
        return location, None
    parts = location.split("/")
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    return "/".join(parts[:first]) or ("/" if location.startswith("/") else "."), "/".join(
        parts[first:]
    )


def _glob_regex(pattern: str) -> str:
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
