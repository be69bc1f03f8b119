"""Opens the source in `prepare.images`; `prepare.source=auto` detects its kind by file names.

Detection descends into folders only until it finds a file of a known kind.
"""

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Literal

from pyarrow import fs

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.prepare.sources import (
    huggingface_imagefolder,
    loose_files,
    parquet_files,
    tfrecord,
    webdataset,
)
from ray_jobs.prepare.sources.source import Source
from ray_jobs.prepare.table import require_columns
from ray_jobs.storage.folder import Folder, expand_braces, split_glob

Kind = Literal["folder", "parquet", "webdataset", "tfrecord", "imagefolder"]

_SOURCES: dict[Kind, tuple[str, Callable[[PrepareSpec], Source]]] = {
    "folder": ("image files", loose_files.open_source),
    "imagefolder": ("image files with metadata", huggingface_imagefolder.open_source),
    "parquet": ("Parquet files", parquet_files.open_source),
    "webdataset": ("tar files", webdataset.open_source),
    "tfrecord": ("TFRecord files", tfrecord.open_source),
}
_MAX_FOLDERS = 64
"""Maximum number of folders to search per level."""


def open_source(
    spec: PrepareSpec, categorical: Sequence[str] = (), labelled: bool = True
) -> Source:
    """Return the records and images of the `prepare` section.

    Args:
        spec: The `prepare` section.
        categorical: Columns of words, which must exist.
        labelled: Whether the label column must exist.

    Raises:
        JobError: If a file, folder or column is missing, a file is damaged, or there is no image.
    """
    if not spec.images:
        raise JobError("prepare.images is not set; give the folder, glob or URI of the images")
    kind = detect_kind(spec) if spec.source == "auto" else spec.source
    _, open_kind = _SOURCES[kind]
    source = open_kind(spec)
    require_columns(source.table, spec, categorical, labelled=labelled)
    return source


def detect_kind(spec: PrepareSpec) -> Kind:
    """Return the kind of the files in `prepare.images`, by their names or by a glob's ending.

    Image files without a table are an ImageFolder.

    Raises:
        JobError: If there are files of several kinds, or of no known kind.
    """
    base, pattern = split_glob(spec.images)
    if pattern is not None and (kind := _kind_of(expand_braces(pattern)[0])):
        return _resolve_images(kind, spec)
    folder = Folder(base)
    root = folder.filesystem.get_file_info(folder.path)
    if root.type == fs.FileType.NotFound:
        raise JobError(f"prepare.images={spec.images!r}: there is no {folder}")
    kinds, other = _search(folder, root, spec)
    if "imagefolder" in kinds and "folder" in kinds:
        # Metadata next to images describes them.
        del kinds["imagefolder" if spec.table else "folder"]
    if len(kinds) > 1:
        names = " and ".join(f"{_SOURCES[k][0]} ({name})" for k, name in sorted(kinds.items()))
        raise JobError(
            f"prepare.images={spec.images!r} holds {names}; set prepare.source to one of "
            f"{', '.join(sorted(kinds))}, or give a glob"
        )
    if not kinds:
        examples = f"found {', '.join(sorted(other)[:3])}" if other else "found nothing"
        raise JobError(
            f"prepare.images={spec.images!r}: there are no images, Parquet, tar or TFRecord files "
            f"({examples}); set prepare.source"
        )
    return _resolve_images(next(iter(kinds)), spec)


def _search(
    folder: Folder, root: fs.FileInfo, spec: PrepareSpec
) -> tuple[dict[Kind, str], list[str]]:
    """Return the kinds on the first level that has any, with a file of each, and other files."""
    table_path = Folder(spec.table).path if spec.table else None
    kinds: dict[Kind, str] = {}
    other: list[str] = []
    level = [root]
    # Metadata may be in a folder above its images.
    while level and not kinds:
        for info in level:
            if info.type == fs.FileType.Directory:
                continue
            if kind := _kind_of(info.base_name):
                kinds.setdefault(kind, info.base_name)
            else:
                other.append(info.base_name)
        folders = sorted(info.path for info in level if info.type == fs.FileType.Directory)
        level = [
            info
            for path in folders[:_MAX_FOLDERS]
            for info in folder.filesystem.get_file_info(fs.FileSelector(path))
            if not info.base_name.startswith((".", "_")) and info.path != table_path
        ]
    return kinds, other


def _kind_of(name: str) -> Kind | None:
    if PurePosixPath(name).name in huggingface_imagefolder.METADATA:
        return "imagefolder"
    if name.lower().endswith(huggingface_imagefolder.IMAGE_SUFFIXES):
        return "folder"
    if parquet_files.is_parquet(name):
        return "parquet"
    if webdataset.is_tar(name):
        return "webdataset"
    return "tfrecord" if tfrecord.is_tfrecord(name) else None


def _resolve_images(kind: Kind, spec: PrepareSpec) -> Kind:
    """Return the kind of image files: loose files with a table, otherwise an ImageFolder."""
    if kind in ("folder", "imagefolder"):
        return "folder" if spec.table else "imagefolder"
    return kind
