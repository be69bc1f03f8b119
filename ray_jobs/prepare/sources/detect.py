"""What `prepare.source: auto` means: the kind of a source, told by the names of its files.

Looks no deeper into folders than to the first files that tell. Imports neither Ray nor TensorFlow.
"""

from pathlib import PurePosixPath
from typing import Literal

from pyarrow import fs

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.prepare.sources.huggingface_imagefolder import IMAGE_SUFFIXES, METADATA
from ray_jobs.prepare.sources.parquet_files import is_parquet
from ray_jobs.prepare.sources.tfrecord import is_tfrecord
from ray_jobs.prepare.sources.webdataset import is_tar
from ray_jobs.storage.folder import Folder, expand_braces, split_glob

Kind = Literal["folder", "parquet", "webdataset", "tfrecord", "imagefolder"]

_WHAT: dict[Kind, str] = {
    "folder": "image files",
    "imagefolder": "image files with metadata",
    "parquet": "Parquet files",
    "webdataset": "tar files",
    "tfrecord": "TFRecord files",
}
_MAX_FOLDERS = 64
"""Folders of one depth that are looked into."""


def detect_kind(spec: PrepareSpec) -> Kind:
    """Return the kind of the source that `prepare.images` names.

    Names of files tell, or what a glob asks for; without a table, images are an ImageFolder.

    Raises:
        JobError: if files of several kinds stand side by side, or nothing is known there.
    """
    if not spec.images:
        raise JobError("prepare.images is not set: give the folder, glob or URI of the images")
    base, pattern = split_glob(spec.images)
    if pattern is not None and (kind := _kind_of(expand_braces(pattern)[0])):
        return _with_table(kind, spec)
    folder = Folder(base)
    info = folder.filesystem.get_file_info(folder.path)
    if info.type == fs.FileType.File:
        if kind := _kind_of(info.base_name):
            return _with_table(kind, spec)
        raise JobError(f"prepare.images={spec.images!r}: {_unknown([info.base_name])}")
    if info.type == fs.FileType.NotFound:
        raise JobError(f"prepare.images={spec.images!r}: there is no {folder}")
    kinds, others = _look(folder, spec)
    # Metadata beside images describes them.
    if "imagefolder" in kinds and "folder" in kinds:
        del kinds["imagefolder" if spec.table else "folder"]
    if len(kinds) > 1:
        found = " and ".join(f"{_WHAT[k]} ({name})" for k, name in sorted(kinds.items()))
        raise JobError(
            f"prepare.images={spec.images!r} holds {found}; say with prepare.source which of them "
            f"is meant ({', '.join(sorted(kinds))}), or give a glob"
        )
    if kinds:
        return _with_table(next(iter(kinds)), spec)
    raise JobError(f"prepare.images={spec.images!r}: {_unknown(others)}")


def _look(folder: Folder, spec: PrepareSpec) -> tuple[dict[Kind, str], list[str]]:
    """Return the kinds found at the least depth where there are any, by a file of each."""
    table_path = Folder(spec.table).path if spec.table else None
    others: list[str] = []
    level = [folder.path]
    while level:
        kinds: dict[Kind, str] = {}
        below: list[str] = []
        for path in level[:_MAX_FOLDERS]:
            for info in folder.filesystem.get_file_info(fs.FileSelector(path)):
                if info.base_name.startswith((".", "_")) or info.path == table_path:
                    continue
                if info.type == fs.FileType.Directory:
                    below.append(info.path)
                elif kind := _kind_of(info.base_name):
                    kinds.setdefault(kind, info.base_name)
                else:
                    others.append(info.base_name)
        # Metadata may stand above the folders of its images.
        if kinds:
            return kinds, others
        level = sorted(below)
    return {}, others


def _kind_of(name: str) -> Kind | None:
    if PurePosixPath(name).name in METADATA:
        return "imagefolder"
    if name.lower().endswith(IMAGE_SUFFIXES):
        return "folder"
    if is_parquet(name):
        return "parquet"
    if is_tar(name):
        return "webdataset"
    return "tfrecord" if is_tfrecord(name) else None


def _with_table(kind: Kind, spec: PrepareSpec) -> Kind:
    """Return what images without a table, and metadata with one, are."""
    if kind in ("folder", "imagefolder"):
        return "folder" if spec.table else "imagefolder"
    return kind


def _unknown(names: list[str]) -> str:
    seen = f"only {', '.join(sorted(names)[:3])}" if names else "nothing"
    return (
        f"there are no images, Parquet, tar or TFRecord files ({seen}); say with prepare.source "
        "what it is"
    )
