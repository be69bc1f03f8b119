import numpy as np
import pytest

from ray_jobs.inspect.shard_scan import hash_key
from tests.ray_jobs.inspect.samples import SIZE, SPLITS, look, photo, rows, text_of, write
from tests.ray_jobs.tiny import jpeg


def test_black_white_flat_and_unreadable_images_are_counted_but_not_compared(tmp_path):
    def plain(value: int) -> bytes:
        return jpeg(np.full((SIZE, SIZE, 3), value, np.uint8))

    data = {split: rows(split, 20) for split in SPLITS}
    data["train"]["image"][:5] = [plain(0), plain(255), plain(128), b"no image", b""]
    data["test"]["image"][0] = plain(3)
    data["test"]["image"][1] = jpeg(photo(5, size=16))
    report = look(write(tmp_path, data))
    (facts,) = report.images
    train, test = facts.splits["train"], facts.splits["test"]
    assert (train.black, train.white, train.flat, train.unreadable) == (1, 1, 1, 2)
    assert (test.black, test.white, test.flat, test.unreadable) == (1, 0, 0, 1)
    assert [o.near for o in report.duplicates.overlaps] == [0, 0, 0]
    assert [ref.key for ref in facts.examples] == ["train-0", "train-1", "train-2", "test-0"]
    assert text_of(report, "unreadable_image") == (
        "3 unreadable images in column image (train 2, test 1)."
    )
    assert text_of(report, "black_image") == "2 black images in column image (train 1, test 1)."


def test_the_contact_sheet_shows_rows_of_each_class_and_the_quarantine_its_reasons(tmp_path):
    bad: list[tuple[str | None, str, str]] = [
        (f"bad-{i}", "missing_image", f"{i}.jpg: no such file") for i in range(7)
    ]
    bad.append((None, "missing_key", "row 12"))
    folder = write(tmp_path, {s: rows(s, 20) for s in SPLITS}, quarantine=bad)
    report = look(folder)
    for split in SPLITS:
        for label in (0, 1):
            shown = [r for r in report.contact_sheet if (r.split, r.label) == (split, label)]
            keys = [f"{split}-{i}" for i in range(20) if i % 2 == label]
            assert [ref.key for ref in shown] == sorted(keys, key=hash_key)[:8]
    assert [(q.reason, q.num_rows, len(q.examples)) for q in report.quarantine] == [
        ("missing_image", 7, 5), ("missing_key", 1, 1),
    ]  # fmt: skip
    assert report.quarantine[1].examples[0].detail == "row 12"
    texts = [f.text for f in report.findings if f.code == "rows"]
    assert texts[0].startswith("missing_image: 7 of 68 rows; check prepare.images, and")
    assert "0.jpg: no such file" in (folder / "inspect.html").read_text()


def test_a_large_split_is_sampled_by_hash_of_the_key(tmp_path):
    value = np.arange(400, dtype=float)
    folder = write(
        tmp_path,
        {"train": rows("train", 400, place=value), "test": rows("test", 50, place=value[:50])},
    )
    report = look(folder, max_rows=100)
    chosen = [i for i in range(400) if hash_key(f"train-{i}") < 2**64 // 4]
    assert report.splits["train"].rows_inspected == len(chosen)
    assert report.splits["test"].rows_inspected == 50
    assert report.numeric[0].splits["train"].mean == pytest.approx(np.mean(chosen))
    assert report.splits["train"].class_counts == (200, 200)
    assert text_of(report, "sample").startswith(f"Inspected a sample: {len(chosen)} of 400 rows")


def test_classes_more_common_in_one_split_are_a_finding_and_an_empty_split_has_no_statistics(
    tmp_path,
):
    data = {split: rows(split, 100, area=range(100)) for split in ("train", "test")}
    data["test"]["label"] = [int(i % 10 > 0) for i in range(100)]
    report = look(write(tmp_path, data))
    assert text_of(report, "label_drift") == (
        "90.0% of the rows in test are 'yes', compared with 50.0% in train."
    )
    assert report.splits["validation"].positive_share is None
    assert report.numeric[0].splits["validation"].mean is None
    assert report.numeric[0].drift["validation"].psi is None
