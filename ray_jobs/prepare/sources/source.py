"""Defines what every source returns to `prepare`: records without pixels, and image references.

Pixels are read last, row by row, when the usable rows and their shards are known.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from ray_jobs.data.images import BadImage
from ray_jobs.prepare.cell_text import TEXT


@dataclass(frozen=True)
class ImageRefs:
    """Location of each row's image; compact, since there may be many millions."""

    path: pa.LargeStringArray
    """File below the source's folder; null where a row has no image."""
    start: np.ndarray | None = None
    """int64 byte (tar, TFRecord) or row (Parquet) in the file; None for whole files."""
    size: np.ndarray | None = None
    """int64 bytes, where images are parts of files; else None."""

    def __len__(self) -> int:
        return len(self.path)

    @property
    def in_containers(self) -> bool:
        """Whether files hold many images, so that rows are best read in the order of the files."""
        return self.start is not None

    @property
    def has_image(self) -> np.ndarray:
        """Mask of the rows that have an image."""
        return self.path.is_valid().to_numpy(zero_copy_only=False)

    def take(self, rows: np.ndarray | Sequence[int]) -> "ImageRefs":
        """Return the entries of some rows; a negative row gives an entry without an image."""
        rows = np.asarray(rows, np.int64)
        is_none = rows < 0
        return ImageRefs(
            self.path.take(pa.array(rows, mask=is_none)),
            None if self.start is None else np.where(is_none, 0, self.start[rows]),
            None if self.size is None else np.where(is_none, 0, self.size[rows]),
        )

    def name(self, row: int) -> str:
        """Return an image's file and position in it, for error messages."""
        path = self.path[row].as_py()
        return path if self.start is None else f"{path}:{self.start[row]}"


class ImageReader(Protocol):
    """Reads images by their references. Is small and picklable, since every task gets a copy."""

    def read(self, refs: ImageRefs) -> Iterator[bytes | BadImage]:
        """Prefetch, and yield in order, each image's content or why it cannot be read."""
        ...


@dataclass(frozen=True)
class Source:
    """The records of a source, and its images."""

    table: pa.Table
    """The user's columns: key, label, numbers; never pixels."""
    images: Mapping[str, ImageRefs]
    """References, one per row of the table, by name in `prepare.image_columns`; the name is "" for
    one image per row."""
    readers: Mapping[str, ImageReader]
    """Readers by the same names."""
    unmatched: tuple[tuple[str, str, str], ...] = ()
    """Key, reason and detail of each image without a record."""
    quarantined: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    """Row → reason and detail, where the row's image reference is wrong or ambiguous."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the `prepare` section that the source has found, such as `split_column`."""
    notes: tuple[str, ...] = ()
    """What the source has guessed or skipped, for the summary."""


def repeat_paths(names: Sequence[str], counts: Sequence[int]) -> pa.LargeStringArray:
    """Return the file of each image, given the number of images in each file."""
    paths = [pa.repeat(pa.scalar(n, TEXT), count) for n, count in zip(names, counts, strict=True)]
    return pa.concat_arrays(paths)
