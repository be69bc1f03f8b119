"""What every kind of source hands to `prepare`: records without pixels, and where the images are.

Pixels are read last, row by row, when it is known which rows are good and where each belongs.
Imports neither Ray nor TensorFlow.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from ray_jobs.data.images import BadImage


@dataclass(frozen=True)
class ImageRefs:
    """Where images are, an entry a row; compact, since there may be many millions."""

    path: pa.Array
    """File below the source's folder, as string; null where a row has no image."""
    start: np.ndarray | None = None
    """int64: byte in the file (tar, TFRecord) or row of the file (Parquet); None: whole files."""
    size: np.ndarray | None = None
    """int64 bytes, where images are pieces of files; else None."""

    def __len__(self) -> int:
        return len(self.path)

    @property
    def is_there(self) -> np.ndarray:
        """Whether each row has an image."""
        return self.path.is_valid().to_numpy(zero_copy_only=False)

    def take(self, rows: np.ndarray | Sequence[int]) -> "ImageRefs":
        """Return the entries of some rows."""
        rows = np.asarray(rows, np.int64)
        return ImageRefs(
            self.path.take(pa.array(rows)),
            None if self.start is None else self.start[rows],
            None if self.size is None else self.size[rows],
        )

    def name(self, row: int) -> str:
        """Return what an error text calls an image: its file, and the place in it."""
        path = self.path[row].as_py()
        return path if self.start is None else f"{path}:{self.start[row]}"


class ImageReader(Protocol):
    """Reads images by their refs. Small and picklable: tasks anywhere in the cluster hold one."""

    in_containers: bool
    """Whether images lie many to a file, so that rows are best read in the order of the files."""

    def read(self, refs: ImageRefs) -> Iterator[bytes | BadImage]:
        """Yield the content of each image, in order, or why there is none; reads ahead."""
        ...


@dataclass(frozen=True)
class Source:
    """The records of a source, and its images."""

    table: pa.Table
    """The user's columns: key, label, numbers; never pixels."""
    images: dict[str, ImageRefs]
    """By the name in `prepare.image_columns`, or "" for one image a row; as long as the table."""
    readers: dict[str, ImageReader]
    """By the same names."""
    unmatched: tuple[tuple[str, str, str], ...] = ()
    """Key, reason and detail of images in containers that no record names."""
    bad: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    """Row → reason and detail, where what the row says of its image is wrong or unclear."""
    split_column: str | None = None
    """Column that says the split, where the source itself has all three."""
