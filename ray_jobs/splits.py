"""Which split each row stands in: by hash of its group, and for good.

Groups (a row's key where there is no group column) are ranked by hash within their class and cut at
the fractions. The cuts are kept, so that rows that come later fall to either side of them and no
earlier row moves.

    hash   sha256 of "{seed}:{group}", in hexadecimal
    class  of a group: what most of its rows are; 1 where they are equally many

Imports neither Ray nor TensorFlow.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ray_jobs.cli import JobError
from ray_jobs.manifest import Cut
from ray_jobs.spec import SPLITS, Split

Cuts = tuple[Cut, Cut]


def split_hash(seed: int, name: str) -> str:
    """Return the hash that a group is ranked by, or a row is ordered by within its split."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def group_classes(groups: Sequence[str], labels: Iterable[int]) -> dict[str, int]:
    """Return the class of each group: what most of its rows are, 1 on a tie."""
    balance: Counter[str] = Counter()
    for group, label in zip(groups, labels, strict=True):
        balance[group] += 1 if label else -1
    return {group: int(balance[group] >= 0) for group in balance}


def make_cuts(
    groups: Sequence[str],
    labels: Sequence[int],
    seed: int,
    validation_fraction: float,
    test_fraction: float,
) -> Cuts:
    """Return where the hash order of each class is cut, so that the rows' shares come nearest.

    Args:
        groups: of each row.
        labels: of each row.
        seed: of the hash.
        validation_fraction: share of a class's rows for validation.
        test_fraction: share for the test.

    Raises:
        JobError: if there are fewer groups than splits.
    """
    sizes, classes = Counter(groups), group_classes(groups, labels)
    ranked: list[dict[str, int]] = [{}, {}]
    for group, label in classes.items():
        ranked[label][split_hash(seed, group)] = sizes[group]
    # Where hardly a group is mostly of one class, all of them are ranked together for it.
    cuts = [
        _cut(
            of_class if len(of_class) >= len(SPLITS) else ranked[0] | ranked[1],
            validation_fraction,
            test_fraction,
        )
        for of_class in ranked
    ]
    return cuts[0], cuts[1]


def assign(
    groups: Sequence[str],
    labels: Sequence[int],
    seed: int,
    cuts: Cuts,
    earlier: Mapping[str, set[Split]] | None = None,
) -> list[Split]:
    """Return the split of each row.

    Args:
        groups: of each row.
        labels: of each row.
        seed: of the hash.
        cuts: of the classes.
        earlier: splits that rows of a group stood in before. New rows can turn what most of a
            group is; it stays nevertheless, unless its rows have come from several groups.
    """
    split_of: dict[str, Split] = {}
    for group, label in group_classes(groups, labels).items():
        before = (earlier or {}).get(group, set())
        if len(before) == 1:
            split_of[group] = next(iter(before))
        else:
            value = split_hash(seed, group)
            split_of[group] = (
                "test"
                if value < cuts[label].test
                else "validation"
                if value < cuts[label].validation
                else "train"
            )
    return [split_of[group] for group in groups]


def _cut(sizes: Mapping[str, int], validation_fraction: float, test_fraction: float) -> Cut:
    """Return where groups are cut, from the number of rows behind each hash."""
    ranked = sorted(sizes)
    if len(ranked) < len(SPLITS):
        raise JobError(
            f"{len(ranked)} rows or groups that can be used are too few for three splits; add more"
        )
    ends = np.cumsum([sizes[value] for value in ranked])
    test = _nearest(ends, test_fraction * ends[-1], 1, len(ranked) - 2)
    until_validation = (test_fraction + validation_fraction) * ends[-1]
    validation = _nearest(ends, until_validation, test + 1, len(ranked) - 1)
    return Cut(test=ranked[test], validation=ranked[validation])


def _nearest(ends: np.ndarray, target: float, least: int, most: int) -> int:
    """Return how many groups, `least` to `most`, hold a number of rows nearest to the target."""
    return least + int(np.argmin(np.abs(ends[least - 1 : most] - target)))
