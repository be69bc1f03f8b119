"""Opens the source in `prepare.images`; `prepare.source=auto` detects its kind by file names.

Detection descends into folders only until it finds a file of a known kind.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from pyarrow import fs

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.prepare.sources import (
    huggingface_imagefolder,
    loose_files,
    parquet_files,
    tfrecord,
    webdataset,
)
from ray_jobs.prepare.sources.source import Source
from ray_jobs.prepare.sources.source_files import (
    IMAGE_SUFFIXES,
    Walk,
    has_underscore,
    open_location,
)
from ray_jobs.prepare.table import require_columns
from ray_jobs.storage.folder import Folder, split_file

Kind = Literal["folder", "parquet", "webdataset", "tfrecord", "imagefolder"]

_SOURCES: dict[Kind, tuple[str, Callable[[PrepareSpec, bool], Source]]] = {
    "folder": ("image files", loose_files.open_source),
    "imagefolder": (
        "image files with metadata",
        lambda spec, _: huggingface_imagefolder.open_source(spec),
    ),
    "parquet": ("Parquet files", parquet_files.open_source),
    "webdataset": ("tar files", webdataset.open_source),
    "tfrecord": ("TFRecord files", tfrecord.open_source),
}
_MAX_FOLDERS = 16
"""Maximum number of folders to search per level."""


def open_source(
    spec: PrepareSpec,
    categorical: Sequence[str] = (),
    text: Sequence[str] = (),
    labelled: bool = True,
) -> Source:
    """Return the records and images of the `prepare` section.

    Args:
        spec: The `prepare` section.
        categorical: Columns of words, which must exist.
        text: Columns of free text, which must exist.
        labelled: Whether the label column must exist, and settings may be inferred from the data.
            `predict` reads rows by the stored settings alone.

    Raises:
        JobError: If a file, folder or column is missing, a file is damaged, or there is no image.
    """
    if not spec.images:
        raise JobError("prepare.images is not set; give the folder, glob or URI of the images")
    notes: tuple[str, ...] = ()
    if spec.source == "auto":
        kind, notes = _detect(spec)
    else:
        kind = spec.source
    if spec.image_separator is not None and (kind != "folder" or not spec.image_column):
        raise JobError(
            f"prepare.image_separator={spec.image_separator!r} separates paths of image files in "
            "the cells of prepare.image_column, a column of prepare.table; set both, or leave "
            "prepare.image_separator out"
        )
    _, open_kind = _SOURCES[kind]
    source = open_kind(spec, labelled)
    source = replace(source, notes=(*notes, *source.notes))
    spec = spec.model_copy(update=dict(source.settings))
    require_columns(source.table, spec, categorical, text, labelled=labelled)
    if labelled and not source.table.num_rows:
        raise JobError(f"the table {spec.table or spec.images} has no rows")
    return source


def detect_kind(spec: PrepareSpec) -> Kind:
    """Return the kind of the files in `prepare.images`, by their names or by a glob's ending.

    Image files without a table are an ImageFolder. With a table, images win over other files.

    Raises:
        JobError: If there are files of several kinds, or of no known kind.
    """
    return _detect(spec)[0]


def _detect(spec: PrepareSpec) -> tuple[Kind, tuple[str, ...]]:
    """Return the kind of the files in `prepare.images`, and notes for the summary."""
    folder, patterns = open_location(spec.images)
    if patterns and (kind := _kind_of(patterns[0])):
        return _resolve_images(kind, spec), ()
    root = folder.filesystem.get_file_info(folder.path)
    if root.type == fs.FileType.NotFound:
        raise JobError(f"prepare.images={spec.images!r}: there is no {folder}")
    if root.type == fs.FileType.Directory:
        walk = Walk(folder, patterns)
        kinds, other = _search(walk, spec)
        other += walk.notes
    else:
        _, name = split_file(spec.images)
        kind = _kind_of(name)
        kinds: dict[Kind, str] = {kind: name} if kind else {}
        other = [name]
    if "imagefolder" in kinds and "folder" in kinds:
        # Metadata next to images describes them.
        del kinds["imagefolder" if spec.table else "folder"]
    notes: tuple[str, ...] = ()
    found = " and ".join(f"{_SOURCES[k][0]} ({name})" for k, name in sorted(kinds.items()))
    if len(kinds) > 1 and spec.table and "folder" in kinds:
        notes = (f"images read from image files; prepare.images holds {found}",)
        kinds = {"folder": kinds["folder"]}
    if len(kinds) > 1:
        raise JobError(
            f"prepare.images={spec.images!r} holds {found}; set prepare.source to one of "
            f"{', '.join(sorted(kinds))}, or give a glob"
        )
    if not kinds:
        examples = f"found {', '.join(other[:3])}" if other else "found nothing"
        raise JobError(
            f"prepare.images={spec.images!r}: there are no images, Parquet, tar or TFRecord files "
            f"({examples}); set prepare.source"
        )
    return _resolve_images(next(iter(kinds)), spec), notes


def _search(walk: Walk, spec: PrepareSpec) -> tuple[dict[Kind, str], list[str]]:
    """Return the kinds on the first level that has any, with a file of each, and other files."""
    table = Folder(spec.table).path.removeprefix(f"{walk.folder.path}/") if spec.table else None
    kinds: dict[Kind, str] = {}
    other: list[str] = []
    # Metadata may be in a folder above its images.
    for names in walk.levels(_MAX_FOLDERS):
        for name in names:
            if name == table:
                continue
            base = name.rpartition("/")[2]
            if kind := _kind_of(name):
                kinds.setdefault(kind, base)
            else:
                other.append(base)
        if kinds:
            break
    return kinds, other


def _kind_of(name: str) -> Kind | None:
    if name.rpartition("/")[2] in huggingface_imagefolder.METADATA:
        return "imagefolder"
    if name.lower().endswith(IMAGE_SUFFIXES):
        return "folder"
    if has_underscore(name):
        return None
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
