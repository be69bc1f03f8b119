"""Assigns each row to a split, permanently, by the hash of its group.

Groups (a row's key where there is no group column) are ranked by hash within their class and cut at
the fractions. The cuts are stored, so later rows fall on one side of them and no earlier row moves.
Rows with the same image belong to one group; otherwise the test split would have training images.

    hash   sha256 of "{seed}:{group}", in hexadecimal
    class  of a group: the class of most of its rows; 1 on a tie
"""

# pyright: reportAttributeAccessIssue=false

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS
from ray_jobs.config.text import count_text
from ray_jobs.data.manifest import Cut
from ray_jobs.prepare.sources.source import ImageRefs

Cuts = tuple[Cut, Cut]
TRAIN, VALIDATION, TEST = range(len(SPLITS))


@dataclass(frozen=True)
class Groups:
    """The groups of some rows."""

    of_row: np.ndarray
    """Index of each row's group."""
    num_rows: np.ndarray
    """Rows of each group."""
    classes: np.ndarray
    """Class of most rows of each group, 1 on a tie."""
    hashes: np.ndarray
    """Hash that each group is ranked by."""

    @classmethod
    def of(cls, names: pa.LargeStringArray, labels: np.ndarray, seed: int) -> "Groups":
        """Build the groups from each row's group name and label."""
        encoded = names.dictionary_encode()
        of_row = encoded.indices.to_numpy()
        balance = np.bincount(of_row, np.where(labels == 1, 1, -1), len(encoded.dictionary))
        num_rows = np.bincount(of_row, minlength=len(encoded.dictionary))
        return cls(of_row, num_rows, balance >= 0, split_hashes(seed, encoded.dictionary))


def split_hashes(seed: int, names: pa.LargeStringArray) -> np.ndarray:
    """Return the hashes that rank groups, and order rows within their split."""
    hashes = (hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in names)
    return np.fromiter(hashes, "S64", len(names))


def join_by_image(keys: pa.LargeStringArray, images: Sequence[ImageRefs]) -> pa.LargeStringArray:
    """Return the name of each row's group: its key, or one key for all rows that share an image.

    Rows share an image that has the same path and position, under any image name. These rows, and
    rows that share another image with any of them, are named after the smallest of their keys.
    """
    one, other = _shared_images(images)
    order = pc.sort_indices(keys).to_numpy().astype(np.int64)
    least = np.empty(len(keys), np.int64)
    least[order] = np.arange(len(keys))
    while not np.array_equal(least[one], least[other]):
        both = np.minimum(least[one], least[other])
        np.minimum.at(least, one, both)
        np.minimum.at(least, other, both)
        # Each row adopts the result of the row with its smallest key so far.
        least = least[order[least]]
    return keys.take(pa.array(order[least]))


def make_cuts(groups: Groups, validation_fraction: float, test_fraction: float) -> Cuts:
    """Return the cuts of each class's hash order that best match the fractions of its rows.

    Raises:
        JobError: If there are fewer groups than splits.
    """
    cuts = []
    for label in (0, 1):
        chosen = groups.classes == label
        # If too few groups are of this class, rank all groups for it.
        if chosen.sum() < len(SPLITS):
            chosen[:] = True
        order = np.flatnonzero(chosen)[np.argsort(groups.hashes[chosen])]
        cuts.append(
            _cut(groups.hashes[order], groups.num_rows[order], validation_fraction, test_fraction)
        )
    return cuts[0], cuts[1]


def assign(groups: Groups, cuts: Cuts, earlier: np.ndarray | None = None) -> np.ndarray:
    """Return the split of each row, as its index in `SPLITS`.

    Args:
        groups: The groups of the rows.
        cuts: The cuts of the classes.
        earlier: Earlier split of each row, -1 for a new row. A group stays in its split even if new
            rows change its class. If its rows come from several splits, the cuts decide, and the
            whole group moves.
    """
    split = np.full(len(groups.hashes), TRAIN, np.int8)
    for label, cut in enumerate(cuts):
        of_class = groups.classes == label
        split[of_class & (groups.hashes < cut.validation.encode())] = VALIDATION
        split[of_class & (groups.hashes < cut.test.encode())] = TEST
    if earlier is not None:
        is_old = earlier >= 0
        first, last = np.full(len(split), len(SPLITS), np.int8), np.full(len(split), -1, np.int8)
        np.minimum.at(first, groups.of_row[is_old], earlier[is_old])
        np.maximum.at(last, groups.of_row[is_old], earlier[is_old])
        split = np.where(first == last, first, split)
    return split[groups.of_row]


def _shared_images(images: Sequence[ImageRefs]) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of rows that share an image: the first row with it, and each other row."""
    encoded = pa.concat_arrays([refs.path for refs in images]).dictionary_encode().indices
    has_image = encoded.is_valid().to_numpy(zero_copy_only=False)
    path = encoded.fill_null(-1).to_numpy()[has_image]
    row = np.tile(np.arange(len(images[0])), len(images))[has_image]
    start = np.concatenate(
        [np.full(len(refs), -1) if refs.start is None else refs.start for refs in images]
    )[has_image]
    order = np.lexsort((row, start, path))
    path, row, start = path[order], row[order], start[order]
    is_new = np.ones(len(row), bool)
    is_new[1:] = (path[1:] != path[:-1]) | (start[1:] != start[:-1])
    first = row[np.maximum.accumulate(np.where(is_new, np.arange(len(row)), 0))]
    return first[first != row], row[first != row]


def _cut(
    hashes: np.ndarray, num_rows: np.ndarray, validation_fraction: float, test_fraction: float
) -> Cut:
    """Return the cut of groups that are in the order of their hashes."""
    if len(hashes) < len(SPLITS):
        raise JobError(
            f"only {count_text(len(hashes), 'usable row')} or groups for three splits; add more"
        )
    ends = np.cumsum(num_rows)
    test = _nearest(ends, test_fraction * ends[-1], 1, len(ends) - 2)
    until_validation = (test_fraction + validation_fraction) * ends[-1]
    validation = _nearest(ends, until_validation, test + 1, len(ends) - 1)
    return Cut(test=hashes[test].decode(), validation=hashes[validation].decode())


def _nearest(ends: np.ndarray, target: float, least: int, most: int) -> int:
    """Return the number of groups, `least` to `most`, whose rows are nearest to the target."""
    return least + int(np.argmin(np.abs(ends[least - 1 : most] - target)))
