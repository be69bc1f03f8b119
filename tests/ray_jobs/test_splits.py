import hashlib
from collections import Counter

import numpy as np
import pytest

from ray_jobs.cli import JobError
from ray_jobs.splits import assign, group_classes, make_cuts, split_hash

KEYS = [f"row-{i}" for i in range(400)]
LABELS = [int(i % 4 == 0) for i in range(400)]


def test_the_hash_is_sha256_of_seed_and_name():
    assert split_hash(7, "ä") == hashlib.sha256("7:ä".encode()).hexdigest()


def test_each_class_is_cut_at_the_fractions():
    cuts = make_cuts(KEYS, LABELS, 0, 0.15, 0.2)
    counts = Counter(zip(assign(KEYS, LABELS, 0, cuts), LABELS, strict=True))
    assert counts == {
        ("train", 0): 195,
        ("validation", 0): 45,
        ("test", 0): 60,
        ("train", 1): 65,
        ("validation", 1): 15,
        ("test", 1): 20,
    }


def test_the_order_of_the_rows_does_not_matter_and_the_seed_does():
    order = np.random.default_rng(0).permutation(400)
    keys, labels = [KEYS[i] for i in order], [LABELS[i] for i in order]
    cuts = make_cuts(KEYS, LABELS, 0, 0.15, 0.15)
    assert make_cuts(keys, labels, 0, 0.15, 0.15) == cuts
    there = dict(zip(KEYS, assign(KEYS, LABELS, 0, cuts), strict=True))
    assert dict(zip(keys, assign(keys, labels, 0, cuts), strict=True)) == there
    other = assign(KEYS, LABELS, 1, make_cuts(KEYS, LABELS, 1, 0.15, 0.15))
    assert other != list(there.values())


def test_kept_cuts_move_no_row_and_share_out_new_ones():
    cuts = make_cuts(KEYS, LABELS, 0, 0.15, 0.15)
    more = [*KEYS, *(f"new-{i}" for i in range(400))]
    splits = assign(more, LABELS * 2, 0, cuts)
    assert splits[:400] == assign(KEYS, LABELS, 0, cuts)
    assert 0.08 < splits[400:].count("test") / 400 < 0.22


def test_a_group_is_what_most_of_its_rows_are():
    groups = ["a", "a", "a", "b", "b", "c"]
    assert group_classes(groups, [0, 0, 1, 0, 1, 0]) == {"a": 0, "b": 1, "c": 0}


def test_a_group_stands_in_one_split_and_the_shares_are_of_rows():
    rng = np.random.default_rng(0)
    groups = [f"g{i}" for i in range(200) for _ in range(rng.integers(1, 9))]
    labels = [int(hash_[0] in "0123") for hash_ in (split_hash(9, g) for g in groups)]
    splits = assign(groups, labels, 0, make_cuts(groups, labels, 0, 0.15, 0.15))
    assert len(set(zip(groups, splits, strict=True))) == len(set(groups))
    for label in (0, 1):
        of_class = [s for s, at in zip(splits, labels, strict=True) if at == label]
        assert of_class.count("test") / len(of_class) == pytest.approx(0.15, abs=0.03)


def test_a_group_whose_class_turns_stays_where_it_was():
    cuts = make_cuts(KEYS, LABELS, 0, 0.1, 0.4)
    turned = [1 - label for label in LABELS]
    before = dict(zip(KEYS, assign(KEYS, LABELS, 0, cuts), strict=True))
    assert assign(KEYS, turned, 0, cuts) != list(before.values())
    stood = {key: {split} for key, split in before.items()}
    assert assign(KEYS, turned, 0, cuts, stood) == list(before.values())


def test_every_split_gets_a_row_of_a_class_of_three():
    keys = [f"k{i}" for i in range(3)]
    cuts = make_cuts(keys + KEYS, [1, 1, 1] + [0] * 400, 0, 0.15, 0.15)
    assert set(assign(keys, [1, 1, 1], 0, cuts)) == {"train", "validation", "test"}


def test_a_class_that_most_rows_of_no_group_have_is_cut_with_the_other():
    groups = [f"g{i // 4}" for i in range(400)]
    labels = [int(i % 4 == 0) for i in range(400)]
    splits = assign(groups, labels, 0, make_cuts(groups, labels, 0, 0.15, 0.15))
    counts = Counter(zip(splits, labels, strict=True))
    assert counts["test", 1] == counts["validation", 1] == 15
    assert counts["test", 0] == counts["validation", 0] == 45


def test_fewer_rows_than_splits_are_an_error():
    with pytest.raises(JobError, match="2 rows or groups that can be used are too few"):
        make_cuts(["a", "b"], [0, 1], 0, 0.15, 0.15)
