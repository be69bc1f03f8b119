"""The report of `inspect` as data: what inspect.json holds, and the page and the terminal show.

Figures that cannot be told (the mean of no values, the AUC of one class) are null.
"""

from typing import Literal

from mm_model.spec import Spec
from ray_jobs.config.spec import Split


class Finding(Spec):
    """Something that deserves a look."""

    kind: str
    """One word to filter by, such as `leak`."""
    severity: Literal["warning", "note"]
    """Warnings may make a model worthless; notes are worth knowing."""
    text: str


class SplitFacts(Spec):
    """The size of one split."""

    num_rows: int
    class_counts: tuple[int, int]
    share: float
    """Of all rows."""
    positive_share: float | None
    """Of the split's rows."""
    num_shards: int
    num_bytes: int
    rows_inspected: int
    """Less than all where `max_rows` is less."""


class NumberFacts(Spec):
    """The values of one column in one split."""

    num_rows: int
    missing: int
    mean: float | None
    std: float | None
    """Population standard deviation."""
    min: float | None
    median: float | None
    max: float | None
    histogram: tuple[int, ...]
    """Values in each bin; those beyond the first and the last edge are in the end bins."""


class DriftFacts(Spec):
    """How far a column of one split is from the training split's."""

    psi: float | None
    """Population stability index of the values that are there."""
    ks: float | None
    """Two-sample Kolmogorov-Smirnov statistic; null for words."""
    p_value: float | None
    """That a difference such as this is chance: Kolmogorov-Smirnov; for words chi-squared."""
    missing_p_value: float | None
    """The same of the difference in missing shares, by chi-squared."""
    values_drifted: bool
    missing_drifted: bool


class LeakFacts(Spec):
    """How well a column alone tells the label, over all splits; 0.5 is chance."""

    auc: float | None
    """ROC AUC of the values as a score; near 0 tells as much as near 1. Of words: of the share of
    positives that a word has in training, on the other splits."""
    missing_auc: float | None
    """ROC AUC of whether the value is missing."""
    suspect: bool


class NumericFacts(Spec):
    """One numeric column, or the brightness or contrast of one image column."""

    column: str
    edges: tuple[float, ...]
    """Of the histograms' bins, the same in all splits."""
    splits: dict[Split, NumberFacts]
    drift: dict[Split, DriftFacts]
    leak: LeakFacts


class WordFacts(Spec):
    """The words of one column in one split."""

    num_rows: int
    missing: int
    unknown: int
    """Rows with a word that has no code of its own: too rare in training, or not in it."""
    top: dict[str, int]
    """Rows of the training split's most frequent words."""


class CategoryFacts(Spec):
    """One column of words."""

    column: str
    num_words: int
    """Words with a code of their own."""
    splits: dict[Split, WordFacts]
    drift: dict[Split, DriftFacts]
    leak: LeakFacts


class PictureFacts(Spec):
    """The images of one column in one split."""

    num_rows: int
    missing: int
    unreadable: int
    black: int
    white: int
    flat: int
    """Of one colour that is neither black nor white."""


class ImageRef(Spec):
    """One stored image."""

    split: Split
    row: int
    """Place of its row in the split, in stored order."""
    key: str
    column: str
    label: int


class ImageFacts(Spec):
    """One image column."""

    column: str
    splits: dict[Split, PictureFacts]
    brightness: NumericFacts
    """Mean grey of each image, 0 to 255."""
    contrast: NumericFacts
    """Standard deviation of each image's grey."""
    examples: tuple[ImageRef, ...]
    """Some of the black, white and flat ones."""


class ImagePair(Spec):
    """Two images that are the same, or nearly."""

    first: ImageRef
    second: ImageRef
    exact: bool
    """Whether the stored bytes are the same."""
    distance: int
    """Bits in which their perceptual hashes differ, of 64."""


class OverlapFacts(Spec):
    """Images of one split that are in another one, too."""

    first: Split
    second: Split
    exact: int
    """Images of the second split with the same stored bytes as one of the first."""
    near: int
    """Further images of the second split that look like one of the first."""
    complete: bool
    """False where so many images look alike that the search was cut short."""
    examples: tuple[ImagePair, ...]


class DuplicateFacts(Spec):
    """Images that are there more than once."""

    within: dict[Split, int]
    """Images with the same stored bytes as one before in the same split."""
    conflicting: int
    """Images whose stored bytes stand in rows of both classes."""
    overlaps: tuple[OverlapFacts, ...]


class SharedKey(Spec):
    """A key that stands in more than one split."""

    key: str
    splits: tuple[Split, ...]


class KeyFacts(Spec):
    """Keys that stand in more than one split."""

    num_shared: int
    examples: tuple[SharedKey, ...]


class BadRowExample(Spec):
    """A row in quarantine."""

    key: str | None
    detail: str


class QuarantineFacts(Spec):
    """The rows in quarantine with one reason."""

    reason: str
    num_rows: int
    examples: tuple[BadRowExample, ...]


class ImageInfoFacts(Spec):
    """How images are stored."""

    encoding: Literal["jpeg", "raw"]
    height: int
    width: int
    columns: tuple[str, ...]


class Report(Spec):
    """All that `inspect` found."""

    prepared: str
    class_names: tuple[str, str]
    """What 0 and 1 stand for."""
    findings: tuple[Finding, ...] = ()
    splits: dict[Split, SplitFacts]
    store: ImageInfoFacts
    numeric: tuple[NumericFacts, ...]
    categorical: tuple[CategoryFacts, ...]
    images: tuple[ImageFacts, ...]
    duplicates: DuplicateFacts
    keys: KeyFacts
    quarantine: tuple[QuarantineFacts, ...]
    contact_sheet: tuple[ImageRef, ...]
    """Rows of each split and class, chosen by hash of the key."""
    thresholds: dict[str, float]
    """What counts as worth a look."""

    @property
    def columns(self) -> tuple[NumericFacts | CategoryFacts, ...]:
        """The columns of numbers and words, then brightness and contrast of each image column."""
        looks = [facts for image in self.images for facts in (image.brightness, image.contrast)]
        return (*self.numeric, *self.categorical, *looks)
