import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.prepare.shards.splits import Cuts, Groups, assign, cut_splits, join_by_image
from ray_jobs.prepare.shards.splits import make_cuts as cuts_of
from ray_jobs.prepare.sources.source import ImageRefs

KEYS = [f"row-{i}" for i in range(400)]
LABELS = [int(i % 4 == 0) for i in range(400)]


def groups_of(names: Sequence[str], labels: Sequence[int], seed: int) -> Groups:
    return Groups.of(pa.array(names), np.array(labels, np.int8), seed)


def make_cuts(names: Sequence[str], labels: Sequence[int], seed: int, *fractions: float) -> Cuts:
    return cuts_of(groups_of(names, labels, seed), *fractions)


def splits_of(
    names: Sequence[str],
    labels: Sequence[int],
    seed: int,
    cuts: Cuts,
    earlier_splits: Sequence[str | None] | None = None,
) -> list[str]:
    earlier = earlier_splits and np.array([SPLITS.index(s) if s else -1 for s in earlier_splits])
    return [SPLITS[i] for i in assign(groups_of(names, labels, seed), cuts, earlier)]


def split_hash(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def test_each_class_is_cut_at_the_fractions_of_its_keys_in_the_order_of_their_hashes():
    keys = [*KEYS, "ä"]
    labels = [*LABELS, 1]
    cuts = make_cuts(keys, labels, 7, 0.15, 0.2)
    splits = dict(zip(keys, splits_of(keys, labels, 7, cuts), strict=True))
    for label, (num_test, num_validation, num_train) in enumerate([(60, 45, 195), (20, 15, 66)]):
        of_class = [key for key, of_key in zip(keys, labels, strict=True) if of_key == label]
        assert [splits[key] for key in sorted(of_class, key=lambda key: split_hash(7, key))] == [
            *["test"] * num_test,
            *["validation"] * num_validation,
            *["train"] * num_train,
        ]


def test_stored_cuts_move_no_row_and_distribute_new_rows():
    cuts = make_cuts(KEYS, LABELS, 0, 0.15, 0.15)
    more = [*KEYS, *(f"new-{i}" for i in range(400))]
    splits = splits_of(more, LABELS * 2, 0, cuts)
    assert splits[:400] == splits_of(KEYS, LABELS, 0, cuts)
    assert 0.08 < splits[400:].count("test") / 400 < 0.22


def test_groups_are_stratified_by_their_share_of_positive_rows():
    groups = [f"g{i}" for i in range(200) for _ in range(10)]
    positives = np.random.default_rng(0).integers(0, 11, 200)
    labels = [int(j < n) for n in positives for j in range(10)]
    cuts = make_cuts(groups, labels, 0, 0.15, 0.15)
    assert [cut.max_share for cut in cuts[:1] + cuts[-1:]] == [0, 1]
    assert len(cuts) == 6
    for seed in range(20):
        splits = np.array(
            splits_of(groups, labels, seed, make_cuts(groups, labels, seed, 0.2, 0.2))
        )
        for split in ("validation", "test"):
            assert np.mean(splits == split) == pytest.approx(0.2, abs=0.02)
            share = np.mean(np.array(labels)[splits == split])
            assert share == pytest.approx(np.mean(labels), abs=0.06)
    # Any new group has a stratum, also if its share is new.
    assert len(splits_of(["x"] * 100, [1] * 99 + [0], 0, cuts)) == 100


def test_a_group_is_in_one_split_and_fractions_count_rows():
    rng = np.random.default_rng(0)
    groups = [f"g{i}" for i in range(200) for _ in range(rng.integers(1, 9))]
    labels = [int(hash_[0] in "0123") for hash_ in (split_hash(9, g) for g in groups)]
    splits = splits_of(groups, labels, 0, make_cuts(groups, labels, 0, 0.15, 0.15))
    assert len(set(zip(groups, splits, strict=True))) == len(set(groups))
    for label in (0, 1):
        of_class = [s for s, at in zip(splits, labels, strict=True) if at == label]
        assert of_class.count("test") / len(of_class) == pytest.approx(0.15, abs=0.03)


def test_a_group_whose_class_changes_stays_in_its_split():
    cuts = make_cuts(KEYS, LABELS, 0, 0.1, 0.4)
    flipped = [1 - label for label in LABELS]
    before = splits_of(KEYS, LABELS, 0, cuts)
    assert splits_of(KEYS, flipped, 0, cuts) != before
    assert splits_of(KEYS, flipped, 0, cuts, before) == before


def test_new_rows_join_their_group_and_a_group_from_two_splits_is_merged():
    cuts = make_cuts(KEYS, LABELS, 0, 0.15, 0.15)
    groups, labels = ["a", "a", "b", "b"], [1, 0, 1, 0]
    assert splits_of(groups, labels, 0, cuts, ["test", None, "validation", None]) == [
        *["test"] * 2,
        *["validation"] * 2,
    ]
    found = splits_of(groups, labels, 0, cuts, ["test", "train", None, "train"])
    assert found[0] == found[1]
    assert found[2:] == ["train", "train"]


def refs(*paths: str | None, start: Sequence[int] | None = None) -> ImageRefs:
    return ImageRefs(pa.array(paths, pa.string()), None if start is None else np.array(start))


def test_rows_that_share_images_directly_or_in_a_long_chain_are_one_group():
    keys = pa.array(["e", "d", "c", "b", "a", "f"])
    one = refs("1.jpg", "2.jpg", "3.jpg", None, "5.jpg", "6.jpg")
    other = refs(None, "3.jpg", "9.jpg", None, "1.jpg", "7.jpg")
    found = join_by_image(keys, [one, other])
    assert found.to_pylist() == ["a", "c", "c", "b", "a", "f"]
    assert join_by_image(keys, [refs(*"abcdef")]).equals(keys)
    in_tars = refs(*["x.tar"] * 3, *["y.tar"] * 3, start=[0, 512, 0, 512, 0, 1024])
    assert join_by_image(keys, [in_tars]).to_pylist() == ["c", "d", "c", "b", "a", "f"]

    keys = pa.array([f"k{i:03d}" for i in np.random.default_rng(0).permutation(300)])
    chain = [refs(*map(str, range(300))), refs(*map(str, range(1, 301)))]
    assert set(join_by_image(keys, chain).to_pylist()) == {"k000"}


def test_a_class_of_three_rows_has_one_in_each_split():
    keys = [f"k{i}" for i in range(3)]
    cuts = make_cuts(keys + KEYS, [1, 1, 1] + [0] * 400, 0, 0.15, 0.15)
    assert set(splits_of(keys, [1, 1, 1], 0, cuts)) == {"train", "validation", "test"}


def test_a_class_without_groups_of_its_own_is_cut_with_the_other_class():
    groups = [f"g{i // 4}" for i in range(400)]
    labels = [int(i % 4 == 0) for i in range(400)]
    splits = splits_of(groups, labels, 0, make_cuts(groups, labels, 0, 0.15, 0.15))
    counts = Counter(zip(splits, labels, strict=True))
    assert counts["test", 1] == counts["validation", 1] == 15
    assert counts["test", 0] == counts["validation", 0] == 45


# -- every split has both classes, for any seed, if the groups allow it ----------------------------

Structure = list[tuple[int, int]]
"""Negative and positive rows of each group."""

STRUCTURES: dict[str, Structure] = {
    "24 patients, 5 with one positive photo": [(4, 0)] * 19 + [(4, 1)] * 5,
    "many small": [(1, 0)] * 300 + [(0, 1)] * 40 + [(2, 1)] * 60,
    "few large": [(40, 20), (90, 10), (50, 60)],
    "1:100, one positive group of 3 per split": [(10, 0)] * 100 + [(9, 1)] * 3,
    "one giant group": [(900, 100)] + [(5, 0)] * 10 + [(0, 5)] * 2 + [(3, 2)],
    "a giant group of one class": [(0, 900), (5, 5), (0, 4), (4, 0), (3, 0)],
    "a giant mixed group among few": [(900, 900), (3, 0), (3, 0), (0, 2), (0, 2)],
    "too few groups of either kind alone": [(3, 3), (2, 0), (2, 0), (0, 2), (0, 2)],
    "two mixed, one of each class": [(3, 3), (1, 5), (7, 0), (0, 7)],
    "scikit-learn#24656, 31 subjects of one class": [(3, 0)] * 17 + [(0, 3)] * 14,
    "scikit-learn#28218, groups that overlap classes": [(1, 0), (1, 1), (1, 1), (0, 1)],
    "scikit-learn#33085, few groups": [(20, 2), (1, 30), (12, 1), (25, 0)],
    "scikit-learn#13619, sizes 5, 4, 3": [(3, 2), (2, 2), (2, 1)],
    "origami#58, unequal clusters": [(2**i, 1) for i in range(9)],
    "autogluon#5806, a rare value": [(7, 0)] * 7 + [(6, 1)] * 2 + [(0, 1)],
}


def rows_in(structure: Structure) -> tuple[list[str], list[int]]:
    groups = [f"g{i}" for i, counts in enumerate(structure) for _ in range(sum(counts))]
    return groups, [label for counts in structure for label in (0, 1) for _ in range(counts[label])]


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_every_seed_gives_each_split_both_classes(structure):
    names, labels = rows_in(structure)
    giant = max(structure, key=sum)
    for seed in range(200):
        cuts = make_cuts(names, labels, seed, 0.15, 0.15)
        splits = splits_of(names, labels, seed, cuts)
        found = set(zip(splits, labels, strict=True))
        assert found == {(split, label) for split in SPLITS for label in (0, 1)}, seed
        assert len(set(zip(names, splits, strict=True))) == len(structure)
        if sum(giant) > len(names) / 4 and structure.count(giant) == 1:
            assert splits[names.index(f"g{structure.index(giant)}")] == "train"
        # The order of the rows has no influence.
        assert splits_of(names[::-1], labels[::-1], seed, cuts) == splits[::-1]
        assert make_cuts(names[::-1], labels[::-1], seed, 0.15, 0.15) == cuts


def test_each_split_has_its_part_of_a_rare_class_of_groups():
    names, labels = rows_in([(10, 0)] * 1000 + [(9, 1)] * 10)
    for seed in range(200):
        splits = splits_of(names, labels, seed, make_cuts(names, labels, seed, 0.2, 0.2))
        counts = Counter(split for split, label in zip(splits, labels, strict=True) if label)
        assert counts == {"train": 6, "validation": 2, "test": 2}
        assert splits.count("test") == 2020


@pytest.mark.parametrize("fractions", [(0.15, 0), (0, 0.15)])
def test_only_validation_or_only_test_can_be_cut(fractions):
    for structure in ([(3, 0)] * 20 + [(0, 3)] * 20, [(2, 2), (1, 0), (0, 1)], [(2, 1), (1, 2)]):
        names, labels = rows_in(structure)
        for seed in range(50):
            cuts = make_cuts(names, labels, seed, *fractions)
            splits = splits_of(names, labels, seed, cuts)
            wanted = ["train", "validation" if fractions[0] else "test"]
            found = set(zip(splits, labels, strict=True))
            assert found == {(split, label) for split in wanted for label in (0, 1)}
            assert [SPLITS[i] for i in cut_splits(cuts)] == wanted[1:]
            assert set(splits_of([f"n{i}" for i in range(99)], [0] * 99, seed, cuts)) <= {*wanted}


def test_new_groups_of_a_small_stratum_reach_every_split():
    names, labels = rows_in([(4, 1)] * 30 + [(3, 0)])
    new = [f"new-{i}" for i in range(400)]
    for seed in range(10):
        splits = Counter(
            splits_of(new, [0] * 400, seed, make_cuts(names, labels, seed, 0.15, 0.15))
        )
        assert set(splits) == set(SPLITS)


@pytest.mark.parametrize(
    ("structure", "fractions", "message"),
    [
        ([(1, 0), (0, 1)], (0.15, 0.15), "class 0 occurs in only 1 id group, but each of train"),
        ([(9, 0)] * 20 + [(9, 9)] * 2, (0.15, 0.15), "class 1 occurs in only 2 id groups"),
        ([(0, 9)] * 20 + [(1, 0)], (0.15, 0), "of train, validation needs at least one; add some"),
    ],
    ids=["scikit-learn#6177", "fewer positive groups than splits", "only validation is cut"],
)
def test_groups_that_no_seed_can_split_raise_an_error_with_a_remedy(structure, fractions, message):
    for seed in range(20):
        with pytest.raises(JobError, match=message):
            cuts_of(groups_of(*rows_in(structure), seed), *fractions, "id group")
