"""Describes a prepared folder in manifest.json, which all later stages read.

`prepare` writes the manifest last, so a folder with a manifest is complete. Imports neither Ray
nor TensorFlow.
"""

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Sequence
from json import JSONDecodeError
from typing import Literal

import numpy as np
from pydantic import ValidationError

from mm_model.spec import Spec
from mm_model.statistics import NumericStatistics, Vocabulary
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS, PrepareSpec, Split
from ray_jobs.data.batch import IMAGE
from ray_jobs.storage.folder import Folder

MANIFEST = "manifest.json"
SCHEMA_VERSION = 3
Role = Literal[
    "key",
    "label",
    "group",
    "split",
    "fold",
    "weight",
    "image",
    "number",
    "category",
    "text",
    "left_out",
]


class Column(Spec):
    """What a column of the table is, as `prepare` understood it."""

    name: str
    role: Role
    reason: str = ""
    """Why the column is left out."""
    rule: str = ""
    """Rule that its cells are read by, of `prepare.number_rules` or `prepare.text_rules`."""
    proposed: Role | None = None
    """What a column that is left out could be."""


class Shard(Spec):
    """One Parquet file, all or some of whose rows belong to a split."""

    path: str
    """Path below the prepared folder."""
    num_rows: int
    """Rows of the split."""
    row_groups: tuple[int, ...]
    """Rows of the split in each row group, in order."""
    num_bytes: int
    sha256: str
    num_without_image: int = 0
    """Rows without any image, kept by `prepare.missing_image`; not counted in a selection."""
    rows_sha256: str = ""
    """Hash of the inputs of the shard's rows; a rerun skips a shard whose hash is unchanged."""
    selection: str = ""
    """The rows of the split, if these are not all rows of the file: a bit for each row of the file,
    as the base64 of `numpy.packbits`."""

    def select(self, is_selected: np.ndarray) -> "Shard":
        """Return the shard with some of its rows.

        Args:
            is_selected: Boolean, one for each row of a file that belongs to the split as a whole.
        """
        ends = np.cumsum(self.row_groups)
        counts = [int(part.sum()) for part in np.split(is_selected, ends[:-1])]
        changes = {
            "num_rows": sum(counts),
            "row_groups": tuple(counts),
            "num_without_image": 0,
            "selection": b64encode(np.packbits(is_selected).tobytes()).decode(),
        }
        return self.model_copy(update=changes)

    @property
    def num_stored(self) -> int:
        """Rows of the file; up to seven more if it has a selection."""
        return 8 * len(b64decode(self.selection)) or self.num_rows

    def is_selected(self, start: int, num_rows: int) -> np.ndarray:
        """Return which rows of the file belong to the split, if there is a selection.

        Args:
            start: First row.
            num_rows: Number of rows.
        """
        bits = np.frombuffer(b64decode(self.selection), np.uint8)
        return np.unpackbits(bits, count=start + num_rows)[start:].astype(bool)


class SplitInfo(Spec):
    """The shards of one split and its row counts."""

    num_rows: int
    class_counts: tuple[int, int]
    """Rows with label 0 and rows with label 1."""
    class_weights: tuple[float, float] | None = None
    """Sums of the weights of these rows; None without `prepare.weight_column`."""
    shards: tuple[Shard, ...]

    @property
    def num_without_image(self) -> int:
        """Rows without any image."""
        return sum(shard.num_without_image for shard in self.shards)

    @property
    def selection(self) -> str:
        """A hash of which rows of the shards belong to the split; empty if all do."""
        selections = "".join(shard.selection for shard in self.shards)
        return hashlib.sha256(selections.encode()).hexdigest()[:16] if selections else ""

    @property
    def row_bytes(self) -> float:
        """Average bytes of a stored row."""
        num_stored = sum(shard.num_stored for shard in self.shards)
        return max(sum(shard.num_bytes for shard in self.shards) / max(num_stored, 1), 1)


class Cut(Spec):
    """Upper hash limits of the test and validation groups of one stratum; all others train."""

    max_share: float
    """Largest fraction of positive rows of a group in the stratum."""
    test: str
    validation: str


class ImageInfo(Spec):
    """The content of the image columns."""

    encoding: Literal["jpeg", "raw"] = "jpeg"
    """JPEG files, or pixels as fixed-size binary of height × width × 3 bytes."""
    height: int
    width: int
    names: tuple[str, ...] = ()
    """Names of the images of a row, in order; empty if each row has one image."""
    pixel_range: tuple[float, float] | None = None
    """Values of black and white in images with more than 8 bits, as set or found in a sample; 0 to
    255 if the sample had none. None: an earlier version of the program used 0 to 65,535."""
    optional: bool = False
    """Whether rows may lack all images, by `prepare.missing_image=keep`."""
    features: tuple[int, ...] | None = None
    """Shape of backbone features, if the columns contain these instead of images: views and width,
    or views, 1 + tokens and width; float32 numbers as fixed-size binary."""

    @classmethod
    def of(cls, spec: PrepareSpec, pixel_range: tuple[float, float] | None = None) -> "ImageInfo":
        """Return the content that `prepare` stores for its settings."""
        return cls(
            encoding=spec.store,
            height=spec.image_size,
            width=spec.image_size,
            names=spec.image_columns,
            optional=spec.missing_image == "keep",
            pixel_range=pixel_range,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Image or feature columns of the shards."""
        return tuple(f"{IMAGE}_{name}" for name in self.names) or (IMAGE,)

    @property
    def has_nulls(self) -> bool:
        """Whether the columns may have nulls, so that the model needs a mask."""
        return bool(self.names) or self.optional

    @property
    def row_bytes(self) -> int:
        """Bytes of the pixels of a row."""
        return len(self.columns) * self.height * self.width * 3


class Manifest(Spec):
    """The manifest of a prepared folder."""

    schema_version: Literal[3] = SCHEMA_VERSION
    prepare: PrepareSpec
    """Settings that the rows were read with; `predict` reads raw rows with the same settings."""
    seed: int
    """Seed of the split by hash."""
    image: ImageInfo
    columns: tuple[Column, ...] = ()
    """What each column of the table is."""
    numeric_columns: tuple[str, ...]
    vocabularies: tuple[Vocabulary, ...] = ()
    """Vocabularies of the categorical columns in the training split; shards contain the texts."""
    text_columns: tuple[str, ...] = ()
    """Columns of free text."""
    text_words: tuple[str, ...] = ()
    """Frequent words and characters of these columns in the training split, for text branches that
    are trained from scratch."""
    negative_label: str
    positive_label: str
    splits: dict[Split, SplitInfo]
    cuts: tuple[Cut, ...] | None
    """Hash limits of each stratum, by share of positive rows; None if all splits were given."""
    statistics: NumericStatistics | None
    """Statistics of the training split; None without numeric columns."""
    quarantine: dict[str, int]
    """Number of excluded rows by reason."""

    @property
    def is_weighted(self) -> bool:
        """Whether the shards have a column of row weights."""
        return self.prepare.weight_column is not None

    def write(self, folder: Folder) -> None:
        """Write the manifest into a prepared folder."""
        folder.write_json(MANIFEST, self.model_dump(mode="json"))


def read_manifest(folder: Folder) -> Manifest:
    """Return the manifest of a prepared folder, or its copy in a run folder.

    Raises:
        JobError: If it is missing or damaged, or has another schema version.
    """
    if not folder.exists(MANIFEST):
        raise JobError(f"{folder} has no {MANIFEST}; run `python -m ray_jobs.prepare` first")
    path = f"{folder}/{MANIFEST}"
    try:
        tree = folder.read_json(MANIFEST)
        if isinstance(tree, dict) and tree.get("schema_version") != SCHEMA_VERSION:
            raise JobError(
                f"{path} has schema version {tree.get('schema_version')}, but this version of the "
                f"program reads {SCHEMA_VERSION}; prepare the data again"
            )
        return Manifest.model_validate(tree)
    except (JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise JobError(f"{path} is damaged: {error}; prepare the data again") from error


def require_shards(folder: Folder, manifest: Manifest, splits: Sequence[Split] = SPLITS) -> None:
    """Check that the shards of some splits exist and have the right sizes.

    Raises:
        JobError: If a shard is missing or has another size; it names the first such shard.
    """
    shards = [shard for split in splits for shard in manifest.splits[split].shards]
    infos = folder.filesystem.get_file_info([folder.locate(shard.path) for shard in shards])
    for shard, info in zip(shards, infos, strict=True):
        if info.size != shard.num_bytes:
            problem = "is missing" if info.size is None else f"has {info.size} bytes"
            raise JobError(
                f"{folder}/{shard.path} {problem}, but should have {shard.num_bytes}; the prepared "
                "data is damaged or its folder is not shared by all nodes; prepare the data again"
            )
