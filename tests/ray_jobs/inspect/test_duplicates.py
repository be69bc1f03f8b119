import numpy as np

from ray_jobs.inspect.duplicates import NEAR_BITS, nearest_hashes
from tests.ray_jobs.inspect.samples import SPLITS, kinds, look, photo, rows, text_of, write
from tests.ray_jobs.tiny import jpeg


def test_the_search_equals_an_exhaustive_comparison():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2**63, 400, dtype=np.uint64)
    second = []
    for value in first[:200]:
        flips = rng.choice(64, rng.integers(0, 9), replace=False)
        second.append(int(value) ^ sum(1 << int(bit) for bit in flips))
    first, second = np.unique(first), np.unique(np.array(second, np.uint64))
    distances = np.array([[(int(a) ^ int(b)).bit_count() for a in first] for b in second])
    nearest, distance, complete = nearest_hashes(first, second)
    assert complete
    near = distances.min(axis=1) <= NEAR_BITS
    assert 60 < near.sum() < len(second)
    np.testing.assert_array_equal(distance <= NEAR_BITS, near)
    np.testing.assert_array_equal(distance[near], distances.min(axis=1)[near])
    np.testing.assert_array_equal(
        distances[np.flatnonzero(near), nearest[near]], distances.min(axis=1)[near]
    )


def test_a_search_among_similar_images_stops_early():
    hashes = np.arange(1000, dtype=np.uint64)
    _, _, complete = nearest_hashes(hashes, hashes, max_comparisons=10_000)
    assert not complete


def test_exact_and_near_duplicates_across_splits_are_found_with_their_rows(tmp_path):
    data = {split: rows(split, 30) for split in SPLITS}
    data["test"]["image"][4] = data["train"]["image"][9]
    data["validation"]["image"][7] = jpeg(photo(20_011), quality=70)
    data["validation"]["image"][8] = jpeg(np.clip(photo(3) * 0.9 + 8, 0, 255).astype(np.uint8))
    report = look(write(tmp_path, data))
    found = {(o.second, o.first): o for o in report.duplicates.overlaps}
    counts = {names: (o.exact, o.near) for names, o in found.items()}
    assert counts == {
        ("validation", "train"): (0, 1), ("test", "train"): (1, 0), ("test", "validation"): (0, 1),
    }  # fmt: skip
    (same,) = found["test", "train"].examples
    assert (same.first.key, same.second.key) == ("train-9", "test-4")
    assert (same.exact, same.distance, same.first.row, same.second.row) == (True, 0, 9, 4)
    (near,) = found["validation", "train"].examples
    assert (near.first.key, near.second.key, near.exact) == ("train-3", "validation-8", False)
    assert 0 <= near.distance <= NEAR_BITS
    assert text_of(report, "same_image") == (
        "1 image in test with the same bytes as an image in train, such as 'test-4' and 'train-9'."
    )
    assert text_of(report, "conflicting_labels").startswith(
        "2 images with the same bytes in rows of both classes"
    )
    page = (tmp_path / "inspect.html").read_text()
    assert page.count("card pair") == 3
    assert "labels differ" in page


def test_images_repeated_within_a_split_and_keys_in_two_splits_are_found(tmp_path):
    data = {split: rows(split, 20) for split in SPLITS}
    data["train"]["image"][2] = data["train"]["image"][4] = data["train"]["image"][0]
    data["test"]["key"][3] = "train-5"
    report = look(write(tmp_path, data))
    assert report.duplicates.within == {"train": 2, "validation": 0, "test": 0}
    assert report.duplicates.conflicting == 0
    assert report.keys.num_shared == 1
    assert set(kinds(report)) == {"repeated_image", "shared_key"}
    assert text_of(report, "shared_key") == (
        "1 key in more than one split, such as 'train-5' in train and test."
    )
