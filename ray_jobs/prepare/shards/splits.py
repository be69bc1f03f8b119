"""Assigns each row to a split, permanently, by the hash of its group.

Groups (a row's key where there is no group column) are ranked by hash within their stratum and cut
at the fractions. The cuts are stored, so later rows fall on one side of them and no earlier row
moves. Without a group column, rows with the same image belong to one group, so that no split
contains images of another.

    hash     sha256 of "{seed}:{group}", in hexadecimal
    share    of a group: the fraction of its rows that are positive
    stratum  groups with similar shares: 0, 1, and one or more strata in between

Every split needs both classes, so K splits need K groups with a positive row and K groups with a
negative one. That many are also enough: if fewer than K groups are mixed, they go to the splits at
one end of test, validation, train, and groups of one class, if fewer than K, to those at the other.
"""

# pyright: reportAttributeAccessIssue=false

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.config.text import count_text, names_text
from ray_jobs.data.manifest import Cut
from ray_jobs.prepare.sources.source import ImageRefs

Cuts = tuple[Cut, ...]
TRAIN, VALIDATION, TEST = range(len(SPLITS))

_LAST = "g"
"""Greater than any hash."""
_MIN_STRATUM, _MAX_STRATA = 20, 4
"""Groups in a stratum, and number of strata, that mixed groups are divided into."""


@dataclass(frozen=True)
class Groups:
    """The groups of some rows."""

    of_row: np.ndarray
    """Index of each row's group."""
    num_rows: np.ndarray
    """Rows of each group."""
    shares: np.ndarray
    """Fraction of each group's rows that are positive."""
    hashes: np.ndarray
    """Hash that each group is ranked by. A group with more than a quarter of all rows comes last,
    so it is a training group."""

    @classmethod
    def of(
        cls,
        names: pa.LargeStringArray,
        labels: np.ndarray,
        seed: int,
        name_hashes: np.ndarray | None = None,
    ) -> "Groups":
        """Build the groups from each row's group name and label.

        Args:
            names: Name of each row's group.
            labels: Label of each row.
            seed: Seed of the hashes.
            name_hashes: Hash of each row's group name, if it is known.
        """
        encoded = names.dictionary_encode()
        of_row = encoded.indices.to_numpy()
        num_rows = np.bincount(of_row, minlength=len(encoded.dictionary))
        shares = np.bincount(of_row, labels == 1, len(num_rows)) / num_rows
        if name_hashes is None:
            hashes = split_hashes(seed, encoded.dictionary)
        else:
            hashes = np.empty(len(num_rows), name_hashes.dtype)
            hashes[of_row] = name_hashes
        if num_rows.max(initial=1) > max(len(names) / 4, 1):
            largest = np.flatnonzero(num_rows == num_rows.max())
            hashes[largest[np.argmax(hashes[largest])]] = _LAST
        return cls(of_row, num_rows, shares, hashes)


def split_hashes(seed: int, names: pa.LargeStringArray) -> np.ndarray:
    """Return the hashes that rank groups and order the rows of a split."""
    texts = names.to_pylist()
    hashes = (hashlib.sha256(f"{seed}:{text}".encode()).hexdigest() for text in texts)
    return np.fromiter(hashes, "S64", len(texts))


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


def make_cuts(
    groups: Groups, validation_fraction: float, test_fraction: float, noun: str = "row"
) -> Cuts:
    """Return the cuts of each stratum's hash order that best match the fractions of its rows.

    Args:
        groups: The groups to split.
        validation_fraction: Fraction of the validation split; 0 if it is not to be cut.
        test_fraction: Fraction of the test split; 0 if it is not to be cut.
        noun: What a group is, for the error.

    Raises:
        JobError: If no seed gives each split rows of both classes.
    """
    fractions = {TEST: test_fraction, VALIDATION: validation_fraction, TRAIN: 1}
    wanted = [split for split, fraction in fractions.items() if fraction]
    for label, has_label in enumerate((groups.shares < 1, groups.shares > 0)):
        if has_label.sum() < len(wanted):
            splits = names_text(SPLITS[split] for split in sorted(wanted))
            raise JobError(
                f"class {label} occurs in only {count_text(int(has_label.sum()), noun)}, but each "
                f"of {splits} needs at least one; add some"
            )
    limits = _limit_strata(groups.shares)
    stratum = np.searchsorted(limits, groups.shares)
    is_mixed = (groups.shares > 0) & (groups.shares < 1)
    # The largest group is in the last split, train.
    mixed_first = not is_mixed[groups.hashes == _LAST.encode()].any()
    cuts: list[Cut] = []
    for i, limit in enumerate(limits):
        order = np.flatnonzero(stratum == i)
        order = order[np.argsort(groups.hashes[order])]
        n = len(order)
        taken = wanted[:n] if is_mixed[order[0]] == mixed_first else wanted[-n:]
        hashes, num_rows = groups.hashes[order], groups.num_rows[order]
        cuts.append(_cut(hashes, num_rows, limit, taken, fractions))
    return tuple(cuts)


def cut_splits(cuts: Cuts) -> list[int]:
    """Return the splits that cuts were made for, besides train."""
    is_cut = {
        VALIDATION: any(cut.validation > cut.test for cut in cuts),
        TEST: any(cut.test for cut in cuts),
    }
    return [split for split, value in is_cut.items() if value]


def assign(groups: Groups, cuts: Cuts, earlier: np.ndarray | None = None) -> np.ndarray:
    """Return the split of each row, as its index in `SPLITS`.

    Args:
        groups: The groups of the rows.
        cuts: The cuts of the strata.
        earlier: Earlier split of each row, -1 for a new row. A group stays in its split even if new
            rows change its stratum. If its rows come from several splits, the cuts decide, and the
            whole group moves.
    """
    split = np.full(len(groups.hashes), TRAIN, np.int8)
    stratum = np.searchsorted([cut.max_share for cut in cuts], groups.shares)
    for i, cut in enumerate(cuts):
        split[(stratum == i) & (groups.hashes < cut.validation.encode())] = VALIDATION
        split[(stratum == i) & (groups.hashes < cut.test.encode())] = TEST
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


def _limit_strata(shares: np.ndarray) -> list[float]:
    """Return the largest share of each stratum; the last is 1."""
    mixed = np.sort(shares[(shares > 0) & (shares < 1)])
    limits: list[float] = [0.0] if (shares == 0).any() else []
    start = 0
    for i in range(1, _MAX_STRATA):
        limit = mixed[i * len(mixed) // _MAX_STRATA] if len(mixed) else 0
        end = int(np.searchsorted(mixed, limit, side="right"))
        if min(end - start, len(mixed) - end) >= _MIN_STRATUM:
            limits.append(float(limit))
            start = end
    limits += mixed[-1:].tolist()
    limits += [1.0] if (shares == 1).any() else []
    return [*limits[:-1], 1.0]


def _cut(
    hashes: np.ndarray,
    num_rows: np.ndarray,
    max_share: float,
    taken: Sequence[int],
    fractions: dict[int, float],
) -> Cut:
    """Return the cuts between the splits of one stratum, given its groups in the order of hashes.

    Each split in `taken`, in the order of `fractions`, gets at least one group.
    """
    ends = np.cumsum(num_rows)
    is_small = len(taken) < sum(fraction > 0 for fraction in fractions.values())
    limits: list[str] = []
    end, fraction = 0, 0.0
    for split in (TEST, VALIDATION):
        fraction += fractions[split]
        if split in taken:
            most = len(ends) - len(taken) + taken.index(split) + 1
            # The number of groups that best matches the fraction of the rows.
            end += 1 + int(np.argmin(np.abs(ends[end:most] - fraction * ends[-1])))
        low = hashes[end - 1].decode() + "0" if end else ""
        high = hashes[end].decode() if end < len(hashes) else _LAST
        if is_small or high == _LAST:
            # As near as possible to the fraction of all hashes, so new groups reach all splits.
            high = min(max(f"{int(fraction * 16**8):08x}", low), high)
        limits.append(high if fraction else "")
    return Cut(max_share=max_share, test=limits[0], validation=limits[1])
