"""What `prepare` says about the data it wrote: everything a later stage needs to know of it.

Written last, so that a folder with a manifest is whole.  Imports neither Ray nor TensorFlow.
"""

from collections.abc import Sequence
from json import JSONDecodeError
from typing import Literal

from pydantic import ValidationError

from mm_model.spec import Spec
from mm_model.statistics import NumericStatistics, Vocabulary
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS, PrepareSpec, Split
from ray_jobs.data.batch import IMAGE
from ray_jobs.storage.folder import Folder

NAME = "manifest.json"
SCHEMA_VERSION = 2


class Shard(Spec):
    """One Parquet file of a split."""

    path: str
    """Path below the prepared folder."""
    num_rows: int
    row_groups: tuple[int, ...]
    """Rows of each row group, in order."""
    num_bytes: int
    sha256: str
    rows_sha256: str = ""
    """Of what the rows were made from; the same again need not be written again."""


class SplitInfo(Spec):
    """The shards of one split, and how many rows of each class they hold."""

    num_rows: int
    class_counts: tuple[int, int]
    """Rows labelled 0, rows labelled 1."""
    shards: tuple[Shard, ...]

    @property
    def row_bytes(self) -> float:
        """Bytes of a stored row, on the average."""
        return max(sum(shard.num_bytes for shard in self.shards) / max(self.num_rows, 1), 1)


class Cut(Spec):
    """Where the hash order of one class is cut: below `test`, below `validation`, the rest."""

    test: str
    validation: str


class ImageInfo(Spec):
    """What the image columns hold."""

    encoding: Literal["jpeg", "raw"] = "jpeg"
    """JPEG files, or pixels as fixed-size binary: height × width × 3 bytes."""
    height: int
    width: int
    names: tuple[str, ...] = ()
    """Of several images a row, in order; empty where a row has one."""
    features: tuple[int, int] | None = None
    """Views and width of what a frozen backbone gave of each image, where the columns hold that in
    place of images: views × width float32 numbers as fixed-size binary."""

    @classmethod
    def of(cls, spec: PrepareSpec) -> "ImageInfo":
        """Return what `prepare` stores by a specification."""
        size = spec.image_size
        return cls(encoding=spec.store, height=size, width=size, names=spec.image_columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the shards that hold images or features; those of several may be null."""
        return tuple(f"{IMAGE}_{name}" for name in self.names) or (IMAGE,)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's pixels."""
        return len(self.columns) * self.height * self.width * 3


class Manifest(Spec):
    """The manifest of a prepared folder."""

    schema_version: Literal[2] = SCHEMA_VERSION
    prepare: PrepareSpec
    """The rules that the rows were read by; raw rows for `predict` are read by the same."""
    seed: int
    """Seed of the split by hash."""
    image: ImageInfo
    numeric_columns: tuple[str, ...]
    vocabularies: tuple[Vocabulary, ...] = ()
    """Of the categorical columns, fitted on the training split; shards hold their texts."""
    negative_label: str
    positive_label: str
    splits: dict[Split, SplitInfo]
    cuts: tuple[Cut, Cut] | None
    """Of class 0 and class 1; none where the table named the splits."""
    statistics: NumericStatistics | None
    """Of the training split; none where there are no numeric columns."""
    quarantine: dict[str, int]
    """Rows that could not be used, by reason."""

    def write(self, folder: Folder) -> None:
        """Write the manifest into a prepared folder."""
        folder.write_json(NAME, self.model_dump(mode="json"))


def read_manifest(folder: Folder) -> Manifest:
    """Return the manifest of a prepared folder (or the copy in a run folder).

    Raises:
        JobError: if there is none, it is damaged, or it is of another version.
    """
    if not folder.exists(NAME):
        raise JobError(f"no {NAME} in {folder}; has `python -m ray_jobs.prepare` finished there?")
    try:
        tree = folder.read_json(NAME)
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{folder}/{NAME} is damaged: {error}; prepare the data again") from error
    if not isinstance(tree, dict):
        raise JobError(f"{folder}/{NAME} is damaged: it holds no object; prepare the data again")
    if tree.get("schema_version") != SCHEMA_VERSION:
        raise JobError(
            f"{folder}/{NAME} is of schema version {tree.get('schema_version')}, this program "
            f"reads {SCHEMA_VERSION}; prepare the data again"
        )
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        raise JobError(f"{folder}/{NAME} is damaged: {error}") from error


def require_shards(folder: Folder, manifest: Manifest, splits: Sequence[Split] = SPLITS) -> None:
    """Check that the shards of some splits are there, by their sizes.

    Raises:
        JobError: naming the first that is missing or of another size.
    """
    shards = [shard for split in splits for shard in manifest.splits[split].shards]
    infos = folder.filesystem.get_file_info([folder.locate(shard.path) for shard in shards])
    for shard, info in zip(shards, infos, strict=True):
        if info.size != shard.num_bytes:
            found = "is missing" if info.size is None else f"has {info.size} bytes"
            raise JobError(
                f"{folder}/{shard.path} {found}, the manifest says {shard.num_bytes} bytes; the "
                "prepared data is damaged (or its folder is not the same on every node), prepare "
                "it again"
            )
