"""Which split each row stands in: by hash of its group, and for good.

Groups (a row's key where there is no group column) are ranked by hash within their class and cut at
the fractions. The cuts are kept, so that rows that come later fall to either side of them and no
earlier row moves. Rows that show the same image are in one group, too: else the test would be on
images learnt from.

    hash   sha256 of "{seed}:{group}", in hexadecimal
    class  of a group: what most of its rows are; 1 where they are equally many

Imports neither Ray nor TensorFlow.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS
from ray_jobs.data.manifest import Cut
from ray_jobs.prepare.sources.refs import ImageRefs

Cuts = tuple[Cut, Cut]
TRAIN, VALIDATION, TEST = range(len(SPLITS))

_READ_ROWS = 1 << 16


@dataclass(frozen=True)
class Groups:
    """The groups of some rows."""

    of_row: np.ndarray
    """Number of each row's group."""
    num_rows: np.ndarray
    """Rows of each group."""
    classes: np.ndarray
    """What most rows of each group are, 1 on a tie."""
    hashes: np.ndarray
    """What each group is ranked by."""

    @classmethod
    def of(cls, names: pa.StringArray, labels: np.ndarray, seed: int) -> "Groups":
        """Return the groups, from the name of each row's group and its label."""
        encoded = names.dictionary_encode()
        of_row = encoded.indices.to_numpy()
        balance = np.bincount(of_row, np.where(labels == 1, 1, -1), len(encoded.dictionary))
        num_rows = np.bincount(of_row, minlength=len(encoded.dictionary))
        return cls(of_row, num_rows, balance >= 0, split_hashes(seed, encoded.dictionary))


def split_hashes(seed: int, names: pa.StringArray) -> np.ndarray:
    """Return the hashes that groups are ranked by, or rows are ordered by within their split."""
    hashes = np.empty(len(names), "S64")
    for start in range(0, len(names), _READ_ROWS):
        part = names[start : start + _READ_ROWS].to_pylist()
        found = [hashlib.sha256(f"{seed}:{name}".encode()).hexdigest().encode() for name in part]
        hashes[start : start + len(part)] = found
    return hashes


def join_by_image(
    names: pa.StringArray, keys: pa.StringArray, images: Sequence[ImageRefs]
) -> pa.StringArray:
    """Return the names of groups, those of rows that share an image made one.

    Rows share an image that has the same path and place, whichever name it goes by. They, and those
    that share one with any of them, are called by the least of their keys.

    Args:
        names: of each row's group.
        keys: of the rows.
        images: of the rows.
    """
    one, other = _shared_images(images)
    order = pc.sort_indices(keys).to_numpy().astype(np.int64)
    least = np.empty(len(keys), np.int64)
    least[order] = np.arange(len(keys))
    while not np.array_equal(least[one], least[other]):
        both = np.minimum(least[one], least[other])
        np.minimum.at(least, one, both)
        np.minimum.at(least, other, both)
        # Each row takes over what the row of its least key has found by now.
        least = least[order[least]]
    is_joined = np.zeros(len(keys), bool)
    is_joined[one] = is_joined[other] = True
    return pc.if_else(pa.array(is_joined), keys.take(pa.array(order[least])), names)


def make_cuts(groups: Groups, validation_fraction: float, test_fraction: float) -> Cuts:
    """Return where the hash order of each class is cut, so that the rows' shares come nearest.

    Args:
        groups: of the rows.
        validation_fraction: share of a class's rows for validation.
        test_fraction: share for the test.

    Raises:
        JobError: if there are fewer groups than splits.
    """
    cuts = []
    for label in (0, 1):
        chosen = groups.classes == label
        # Where hardly a group is mostly of one class, all of them are ranked together for it.
        if chosen.sum() < len(SPLITS):
            chosen[:] = True
        order = np.flatnonzero(chosen)[np.argsort(groups.hashes[chosen])]
        cuts.append(
            _cut(groups.hashes[order], groups.num_rows[order], validation_fraction, test_fraction)
        )
    return cuts[0], cuts[1]


def assign(groups: Groups, cuts: Cuts, earlier: np.ndarray | None = None) -> np.ndarray:
    """Return the split of each row, as its place in `SPLITS`.

    Args:
        groups: of the rows.
        cuts: of the classes.
        earlier: split that each row stood in before, -1 for a new one. New rows can turn what most
            of a group is; it stays nevertheless, unless its rows have come from several splits:
            then it goes to one of them or to another, but whole.
    """
    split = np.full(len(groups.hashes), TRAIN, np.int8)
    for label, cut in enumerate(cuts):
        of_class = groups.classes == label
        split[of_class & (groups.hashes < cut.validation.encode())] = VALIDATION
        split[of_class & (groups.hashes < cut.test.encode())] = TEST
    if earlier is not None:
        stood = earlier >= 0
        first, last = np.full(len(split), len(SPLITS), np.int8), np.full(len(split), -1, np.int8)
        np.minimum.at(first, groups.of_row[stood], earlier[stood])
        np.maximum.at(last, groups.of_row[stood], earlier[stood])
        split = np.where(first == last, first, split)
    return split[groups.of_row]


def _shared_images(images: Sequence[ImageRefs]) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of rows that share an image: the first that has it, and each other."""
    encoded = pa.concat_arrays([refs.path for refs in images]).dictionary_encode().indices
    is_there = encoded.is_valid().to_numpy(zero_copy_only=False)
    path = encoded.fill_null(-1).to_numpy()[is_there]
    row = np.tile(np.arange(len(images[0])), len(images))[is_there]
    start = np.concatenate(
        [np.full(len(refs), -1) if refs.start is None else refs.start for refs in images]
    )[is_there]
    order = np.lexsort((row, start, path))
    path, row, start = path[order], row[order], start[order]
    is_new = np.ones(len(row), bool)
    is_new[1:] = (path[1:] != path[:-1]) | (start[1:] != start[:-1])
    first = row[np.maximum.accumulate(np.where(is_new, np.arange(len(row)), 0))]
    return first[first != row], row[first != row]


def _cut(
    hashes: np.ndarray, num_rows: np.ndarray, validation_fraction: float, test_fraction: float
) -> Cut:
    """Return where groups, in the order of their hashes, are cut."""
    if len(hashes) < len(SPLITS):
        raise JobError(
            f"{len(hashes)} rows or groups that can be used are too few for three splits; add more"
        )
    ends = np.cumsum(num_rows)
    test = _nearest(ends, test_fraction * ends[-1], 1, len(ends) - 2)
    until_validation = (test_fraction + validation_fraction) * ends[-1]
    validation = _nearest(ends, until_validation, test + 1, len(ends) - 1)
    return Cut(test=hashes[test].decode(), validation=hashes[validation].decode())


def _nearest(ends: np.ndarray, target: float, least: int, most: int) -> int:
    """Return how many groups, `least` to `most`, hold a number of rows nearest to the target."""
    return least + int(np.argmin(np.abs(ends[least - 1 : most] - target)))
