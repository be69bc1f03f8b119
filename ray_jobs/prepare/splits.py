"""Assigns each row to a split, permanently, by the hash of its group.

Groups (a row's key where there is no group column) are ranked by hash within their class and cut at
the fractions. The cuts are stored, so later rows fall on one side of them and no earlier row moves.
Without a group column, rows with the same image belong to one group, so that no split contains
images of another.

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
    """Return the hashes that rank groups and order the rows of a split."""
    hashes = (hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in names)
    return np.fromiter(hashes, "S64", len(names))


def join_by_image(keys: pa.LargeStringArray, images: Sequence[ImageRefs]) -> pa.LargeStringArray:
    """Return the name of each row's group: its key, or one key for all rows that share an image.

    Rows share an image if its path and position are the same, under any image name. These rows, and
    rows that share another image with any of them, are named after the first of their sorted keys.
    """
    # This import takes 0.3 s; `--help` and the tasks of `prepare` do not need it.
    from scipy import sparse
    from scipy.sparse import csgraph

    row, image = _pair_rows_and_images(images)
    num_nodes = len(keys) + image.max(initial=-1) + 1
    pairs = (np.ones(len(row)), (row, len(keys) + image))
    graph = sparse.coo_array(pairs, shape=(num_nodes, num_nodes))
    group = csgraph.connected_components(graph, directed=False)[1][: len(keys)]
    order = pc.sort_indices(keys).to_numpy()
    first = np.unique(group[order], return_index=True)[1]
    return keys.take(pa.array(order[first[group]]))


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


def _pair_rows_and_images(images: Sequence[ImageRefs]) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and the image number of each image reference; one location has one number."""
    path = pa.concat_arrays([refs.path for refs in images]).dictionary_encode().indices
    has_image = path.is_valid().to_numpy(zero_copy_only=False)
    row = np.tile(np.arange(len(images[0])), len(images))
    starts, start = np.unique(
        np.concatenate(
            [np.full(len(refs), -1) if refs.start is None else refs.start for refs in images]
        ),
        return_inverse=True,
    )
    location = path.fill_null(-1).to_numpy().astype(np.int64) * len(starts) + start
    return row[has_image], np.unique(location[has_image], return_inverse=True)[1]


def _cut(
    hashes: np.ndarray, num_rows: np.ndarray, validation_fraction: float, test_fraction: float
) -> Cut:
    """Return the cuts between the splits of one class, given its groups in the order of hashes."""
    if len(hashes) < len(SPLITS):
        raise JobError(
            f"only {count_text(len(hashes), 'usable row')} or groups for three splits; add rows"
        )
    ends = np.cumsum(num_rows)
    test = _nearest(ends, test_fraction * ends[-1], 1, len(ends) - 2)
    until_validation = (test_fraction + validation_fraction) * ends[-1]
    validation = _nearest(ends, until_validation, test + 1, len(ends) - 1)
    return Cut(test=hashes[test].decode(), validation=hashes[validation].decode())


def _nearest(ends: np.ndarray, target: float, least: int, most: int) -> int:
    """Return the number of groups, from `least` to `most`, that best matches a target in rows."""
    return least + int(np.argmin(np.abs(ends[least - 1 : most] - target)))
