import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS
from ray_jobs.prepare.sources.source import ImageRefs
from ray_jobs.prepare.splits import Cuts, Groups, assign, join_by_image, split_hashes
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


def test_the_hash_is_sha256_of_seed_and_name():
    hashes = split_hashes(7, pa.array(["ä", "b"]))
    assert hashes.tolist() == [split_hash(7, name).encode() for name in "äb"]


def test_each_class_is_cut_at_the_fractions():
    cuts = make_cuts(KEYS, LABELS, 0, 0.15, 0.2)
    counts = Counter(zip(splits_of(KEYS, LABELS, 0, cuts), LABELS, strict=True))
    assert counts == {
        ("train", 0): 195,
        ("validation", 0): 45,
        ("test", 0): 60,
        ("train", 1): 65,
        ("validation", 1): 15,
        ("test", 1): 20,
    }


def test_splits_depend_on_the_seed_but_not_on_the_order_of_rows():
    order = np.random.default_rng(0).permutation(400)
    keys, labels = [KEYS[i] for i in order], [LABELS[i] for i in order]
    cuts = make_cuts(KEYS, LABELS, 0, 0.15, 0.15)
    assert make_cuts(keys, labels, 0, 0.15, 0.15) == cuts
    expected = dict(zip(KEYS, splits_of(KEYS, LABELS, 0, cuts), strict=True))
    assert dict(zip(keys, splits_of(keys, labels, 0, cuts), strict=True)) == expected
    other = splits_of(KEYS, LABELS, 1, make_cuts(KEYS, LABELS, 1, 0.15, 0.15))
    assert other != list(expected.values())


def test_stored_cuts_move_no_row_and_distribute_new_rows():
    cuts = make_cuts(KEYS, LABELS, 0, 0.15, 0.15)
    more = [*KEYS, *(f"new-{i}" for i in range(400))]
    splits = splits_of(more, LABELS * 2, 0, cuts)
    assert splits[:400] == splits_of(KEYS, LABELS, 0, cuts)
    assert 0.08 < splits[400:].count("test") / 400 < 0.22


def test_a_group_has_the_class_of_most_of_its_rows():
    groups = ["a", "a", "a", "b", "b", "c"]
    found = groups_of(groups, [0, 0, 1, 0, 1, 0], 0)
    assert found.classes.tolist() == [0, 1, 0]
    assert found.num_rows.tolist() == [3, 2, 1]


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


def test_rows_that_share_images_directly_or_indirectly_are_one_group():
    keys = pa.array(["e", "d", "c", "b", "a", "f"])
    one = refs("1.jpg", "2.jpg", "3.jpg", None, "5.jpg", "6.jpg")
    other = refs(None, "3.jpg", "9.jpg", None, "1.jpg", "7.jpg")
    found = join_by_image(keys, [one, other])
    assert found.to_pylist() == ["a", "c", "c", "b", "a", "f"]
    assert join_by_image(keys, [refs(*"abcdef")]).equals(keys)


def test_a_long_chain_of_shared_images_is_one_group():
    keys = pa.array([f"k{i:03d}" for i in np.random.default_rng(0).permutation(300)])
    chain = [refs(*map(str, range(300))), refs(*map(str, range(1, 301)))]
    assert set(join_by_image(keys, chain).to_pylist()) == {"k000"}


def test_images_at_other_positions_of_a_file_are_different():
    keys = pa.array(["a", "b", "c", "d"])
    found = join_by_image(keys, [refs(*["x.tar"] * 3, "y.tar", start=[0, 512, 0, 512])])
    assert found.to_pylist() == ["a", "b", "a", "d"]


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
