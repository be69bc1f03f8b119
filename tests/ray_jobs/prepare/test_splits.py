import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS
from ray_jobs.prepare.sources.source import ImageRefs
from ray_jobs.prepare.splits import Cuts, Groups, assign, join_by_image
from ray_jobs.prepare.splits import make_cuts as cuts_of

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


def test_a_group_has_the_class_of_most_of_its_rows_and_1_on_a_tie():
    found = groups_of(["a", "a", "a", "b", "b", "c"], [0, 0, 1, 0, 1, 0], 0)
    assert found.classes.tolist() == [0, 1, 0]


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


def test_fewer_rows_than_splits_raise_an_error():
    with pytest.raises(JobError, match="only 2 usable rows or groups for three splits"):
        make_cuts(["a", "b"], [0, 1], 0, 0.15, 0.15)
