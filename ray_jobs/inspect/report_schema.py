"""Defines the report of `inspect`, which inspect.json stores and the page and terminal show.

Undefined figures, such as the mean of no values or the AUC of one class, are null.
"""

from typing import Literal

from mm_model.spec import Spec
from ray_jobs.checks.column_drift import Drift
from ray_jobs.checks.finding import Finding
from ray_jobs.config.prepare_spec import Split


class SplitSummary(Spec):
    """The size of one split."""

    num_rows: int
    class_counts: tuple[int, int]
    share: float
    """Fraction of all rows that are in this split."""
    positive_share: float | None
    """Fraction of the rows of the split that are positive."""
    num_shards: int
    num_bytes: int
    rows_inspected: int
    """Lower than `num_rows` if the split has more than `max_rows` rows."""


class NumericSummary(Spec):
    """The values of one numeric column in one split."""

    num_rows: int
    missing: int
    mean: float | None
    std: float | None
    """Population standard deviation."""
    min: float | None
    median: float | None
    max: float | None
    histogram: tuple[int, ...]
    """Values per bin; the outer bins include all values beyond the edges."""


class Leakage(Spec):
    """How well one column alone predicts the label, over all splits; 0.5 is chance."""

    auc: float | None
    """ROC AUC of the values as a score; values near 0 are as suspicious as values near 1. For
    categorical columns, the score is the positive fraction of the category in the training split,
    and the AUC is measured on the other splits."""
    missing_auc: float | None
    """ROC AUC of whether the value is missing."""
    suspect: bool


class NumericColumn(Spec):
    """One numeric column, or the brightness or contrast of one image column."""

    column: str
    edges: tuple[float, ...]
    """Edges of the histogram bins, the same in all splits."""
    splits: dict[Split, NumericSummary]
    drift: dict[Split, Drift]
    leak: Leakage


class CategorySummary(Spec):
    """The categories of one column in one split."""

    num_rows: int
    missing: int
    unknown: int
    """Rows whose category has no code, because it is rare or absent in the training split."""
    top: dict[str, int]
    """Number of rows for each of the most frequent categories of the training split."""


class CategoryColumn(Spec):
    """One categorical column."""

    column: str
    num_words: int
    """Categories with a code."""
    splits: dict[Split, CategorySummary]
    drift: dict[Split, Drift]
    leak: Leakage


class ImageSummary(Spec):
    """The images of one column in one split."""

    num_rows: int
    missing: int
    unreadable: int
    black: int
    white: int
    flat: int
    """Images of a single colour other than black and white."""


class ImageRef(Spec):
    """One stored image."""

    split: Split
    row: int
    """Index of its row in the split, in stored order."""
    key: str
    column: str
    label: int


class ImageColumn(Spec):
    """One image column."""

    column: str
    splits: dict[Split, ImageSummary]
    brightness: NumericColumn
    """Mean grey level of each image, 0 to 255."""
    contrast: NumericColumn
    """Standard deviation of each image's grey levels."""
    examples: tuple[ImageRef, ...]
    """Some black, white and single-colour images."""


class ImagePair(Spec):
    """Two identical or nearly identical images."""

    first: ImageRef
    second: ImageRef
    exact: bool
    """Whether the stored bytes are the same."""
    distance: int
    """Number of bits in which their 64-bit perceptual hashes differ."""


class Overlap(Spec):
    """Images of the second split that also occur in the first."""

    first: Split
    second: Split
    exact: int
    """Images of the second split with the same stored bytes as an image of the first."""
    near: int
    """Further images of the second split that look like an image of the first."""
    complete: bool
    """False if the search stopped early because too many images look alike."""
    examples: tuple[ImagePair, ...]


class Duplicates(Spec):
    """Images that occur more than once."""

    within: dict[Split, int]
    """Images with the same stored bytes as an earlier image of the same split."""
    conflicting: int
    """Images whose stored bytes occur in rows of both classes."""
    overlaps: tuple[Overlap, ...]


class SharedKey(Spec):
    """A key that occurs in more than one split."""

    key: str
    splits: tuple[Split, ...]


class SharedKeys(Spec):
    """Keys that occur in more than one split."""

    num_shared: int
    examples: tuple[SharedKey, ...]


class QuarantinedRow(Spec):
    """A row in quarantine."""

    key: str | None
    detail: str


class QuarantineReason(Spec):
    """The rows in quarantine for one reason."""

    reason: str
    num_rows: int
    examples: tuple[QuarantinedRow, ...]


class ImageFormat(Spec):
    """How images are stored."""

    encoding: Literal["jpeg", "raw"]
    height: int
    width: int
    columns: tuple[str, ...]


class Report(Spec):
    """The complete report."""

    prepared: str
    class_names: tuple[str, str]
    """Names of labels 0 and 1."""
    findings: tuple[Finding, ...] = ()
    splits: dict[Split, SplitSummary]
    store: ImageFormat
    numeric: tuple[NumericColumn, ...]
    categorical: tuple[CategoryColumn, ...]
    images: tuple[ImageColumn, ...]
    duplicates: Duplicates
    keys: SharedKeys
    quarantine: tuple[QuarantineReason, ...]
    contact_sheet: tuple[ImageRef, ...]
    """Rows of each split and class, chosen by hash of the key."""
    thresholds: dict[str, float]
    """Thresholds by which problems are found."""

    @property
    def columns(self) -> tuple[NumericColumn | CategoryColumn, ...]:
        """Numeric and categorical columns, then brightness and contrast of each image column."""
        grey = [column for image in self.images for column in (image.brightness, image.contrast)]
        return (*self.numeric, *self.categorical, *grey)
