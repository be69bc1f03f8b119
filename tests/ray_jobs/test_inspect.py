import hashlib
import io
import json
import re
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import fft, stats

from mm_model.statistics import fit_vocabulary
from ray_jobs.cli import JobError
from ray_jobs.inspect import inspect
from ray_jobs.inspection.duplicates import NEAR_BITS, nearest_hashes
from ray_jobs.inspection.facts import Report
from ray_jobs.inspection.scan import hash_key, perceptual_hashes
from ray_jobs.manifest import ImageInfo, Manifest, Shard, SplitInfo
from ray_jobs.spec import InspectSpec, PrepareSpec
from ray_jobs.storage import Folder
from tests.ray_jobs.tiny import COLUMNS, write_prepared

SIZE = 32
SPLITS = ("train", "validation", "test")


def photo(seed: int, size: int = SIZE) -> np.ndarray:
    """Pixels that look like nothing else: soft blobs of colour."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def rows(split: str, count: int, **columns: Any) -> dict[str, Any]:
    """Rows of a split with a photo each; every other one is positive."""
    seed = SPLITS.index(split) * 10_000
    return {
        "key": [f"{split}-{i}" for i in range(count)],
        "image": [jpeg(photo(seed + i)) for i in range(count)],
        "label": [i % 2 for i in range(count)],
        **columns,
    }


def write(
    folder: Path,
    splits: dict[str, dict[str, Any]],
    *,
    image: ImageInfo | None = None,
    categorical: tuple[str, ...] = (),
    quarantine: list[tuple[str | None, str, str]] | None = None,
    labels: tuple[str, str] = ("no", "yes"),
) -> Path:
    """Write prepared data with the given columns; of those with no role all are numbers."""
    image = image or ImageInfo(height=SIZE, width=SIZE)
    pixels = pa.binary(image.height * image.width * 3) if image.encoding == "raw" else pa.binary()
    types = {"key": pa.string(), "label": pa.int8()}
    types |= dict.fromkeys(image.columns, pixels) | dict.fromkeys(categorical, pa.string())
    infos = {}
    for split in SPLITS:
        columns = splits.get(split, {name: [] for name in splits["train"]})
        table = pa.table(
            {
                name: pa.array(values, types.get(name, pa.float32()), from_pandas=True)
                for name, values in columns.items()
            }
        )
        path = folder / split / "part-00000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=7)
        content = path.read_bytes()
        sizes = tuple(min(7, table.num_rows - i) for i in range(0, table.num_rows, 7))
        shard = Shard(
            path=f"{split}/part-00000.parquet",
            num_rows=table.num_rows,
            row_groups=sizes,
            num_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        positives = int(np.sum(columns["label"]))
        infos[split] = SplitInfo(
            num_rows=table.num_rows,
            class_counts=(table.num_rows - positives, positives),
            shards=(shard,) if table.num_rows else (),
        )
    bad = quarantine or []
    if bad:
        (folder / "quarantine").mkdir()
        names = ("key", "reason", "detail")
        columns = {name: [row[i] for row in bad] for i, name in enumerate(names)}
        pq.write_table(pa.table(columns), folder / "quarantine" / "part-00000.parquet")
    train = splits["train"]
    Manifest(
        prepare=PrepareSpec(),
        seed=0,
        image=image,
        numeric_columns=tuple(name for name in train if name not in types),
        vocabularies=tuple(fit_vocabulary(train[name], name) for name in categorical),
        negative_label=labels[0],
        positive_label=labels[1],
        splits=infos,
        cuts=None,
        statistics=None,
        quarantine={reason: sum(b[1] == reason for b in bad) for _, reason, _ in bad},
    ).write(Folder(folder))
    return folder


def look(folder: Path, **settings: Any) -> Report:
    return inspect(InspectSpec(prepared=str(folder), **settings))


def kinds(report: Report) -> list[str]:
    return [finding.kind for finding in report.findings]


def text_of(report: Report, kind: str) -> str:
    (finding,) = [finding for finding in report.findings if finding.kind == kind]
    return finding.text


def stored(folder: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((folder / split).glob("*")))


def psi(first: list[float], second: list[float]) -> float:
    return sum((q - p) * np.log(q / p) for p, q in zip(first, second, strict=True))


# -- the whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "prepared"
    write_prepared(folder, {"train": 203, "validation": 61, "test": 47})
    return folder


def test_the_verb_prints_and_writes_a_page_and_the_same_figures_for_programs(harmless, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "ray_jobs.inspect", str(harmless), "--output", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert f"done → {tmp_path}/inspect.html" in result.stdout
    report = Report.model_validate(json.loads((tmp_path / "inspect.json").read_text()))
    assert report == look(harmless, output=str(tmp_path / "again"))
    for finding in report.findings:
        assert finding.text in result.stdout
    assert [facts.num_rows for facts in report.splits.values()] == [203, 61, 47]
    assert report.splits["test"].share == 47 / 311
    assert (tmp_path / "inspect.html").read_bytes() == (
        tmp_path / "again" / "inspect.html"
    ).read_bytes()


def test_the_page_loads_and_runs_nothing(harmless, tmp_path):
    look(harmless, output=str(tmp_path))
    page = (tmp_path / "inspect.html").read_text()
    assert "default-src 'none'" in page
    assert re.findall(r"<script|https?://|@import|url\(", page) == []
    assert set(re.findall(r"(?:src|href)='(.{22})", page)) == {"data:image/jpeg;base64"}
    assert page.count("<svg") == len(COLUMNS) + 2


def test_without_an_output_the_report_lies_in_the_prepared_folder(tmp_path, capsys):
    folder = write(tmp_path, {split: rows(split, 30) for split in SPLITS})
    report = look(folder)
    assert report.findings == ()
    assert "nothing suspicious found" in capsys.readouterr().out
    assert "Nothing suspicious found." in (folder / "inspect.html").read_text()
    assert (folder / "inspect.json").exists()


# -- numbers --------------------------------------------------------------------------------------


def test_figures_of_numbers_are_those_of_numpy(harmless, tmp_path):
    report = look(harmless, output=str(tmp_path))
    assert [facts.column for facts in report.numeric] == list(COLUMNS)
    for facts in report.numeric:
        for split, found in facts.splits.items():
            value = stored(harmless, split)[facts.column].to_numpy().astype(np.float64)
            there = value[~np.isnan(value)]
            assert found.num_rows == len(value)
            assert found.missing == np.isnan(value).sum()
            assert sum(found.histogram) == len(there)
            expected = [there.mean(), there.std(), there.min(), np.median(there), there.max()]
            figures = [found.mean, found.std, found.min, found.median, found.max]
            np.testing.assert_allclose(figures, expected, rtol=1e-12)


def test_bins_are_the_same_in_all_splits_and_the_outermost_take_what_is_beyond(harmless, tmp_path):
    facts = look(harmless, output=str(tmp_path)).numeric[0]
    for split, found in facts.splits.items():
        value = stored(harmless, split)["alpha"].drop_null().to_numpy().astype(np.float64)
        clipped = np.clip(value, facts.edges[0], facts.edges[-1])
        expected, _ = np.histogram(clipped, np.array(facts.edges))
        # np.histogram puts a value on the last edge into the last bin, as we do.
        assert found.histogram == tuple(expected)


def test_few_whole_numbers_have_a_bin_each(tmp_path):
    values = [1, 2, 2, 5, 5, 5, float("nan"), 1]
    folder = write(tmp_path, {split: rows(split, 8, rooms=values) for split in SPLITS})
    (facts,) = look(folder).numeric
    assert facts.edges == (0.5, 1.5, 2.5, 3.5, 4.5, 5.5)
    assert facts.splits["test"].histogram == (2, 2, 0, 0, 3)
    assert facts.splits["test"].missing == 1


def test_bins_reach_to_where_another_split_lies_and_no_further_than_trainings_own_width(tmp_path):
    train = np.arange(0, 1000, 10) + 0.5
    data = {split: rows(split, 100, x=train + shift) for split, shift in
            (("train", 0.0), ("validation", -200.0), ("test", 90_000.0))}  # fmt: skip
    (facts,) = look(write(tmp_path, data)).numeric
    low, high = np.quantile(train, [0.005, 0.995])
    expected = [np.quantile(train - 200, 0.01), high + (high - low)]
    np.testing.assert_allclose([facts.edges[0], facts.edges[-1]], expected)
    assert facts.splits["test"].histogram[-1] == 100


def test_of_an_empty_bin_the_share_counts_as_one_in_ten_thousand(tmp_path):
    data = {s: rows(s, 100, x=np.arange(100.0)) for s in SPLITS}
    data["test"]["x"] = np.full(100, 5.0)
    drift = look(write(tmp_path, data)).numeric[0].drift["test"]
    expected = psi([0.1] * 10, [1.0] + [1e-4] * 9)
    assert drift.psi == pytest.approx(expected, rel=1e-9)


def test_drift_of_numbers_is_that_of_scipy_and_of_the_definition(harmless, tmp_path):
    report = look(harmless, output=str(tmp_path))
    train = stored(harmless, "train")["alpha"].drop_null().to_numpy().astype(np.float64)
    cuts = [-np.inf, *(np.quantile(train, i / 10) for i in range(1, 10)), np.inf]
    for split in ("validation", "test"):
        other = stored(harmless, split)["alpha"].drop_null().to_numpy().astype(np.float64)
        shares = [
            [
                max(sum(low < v <= high for v in values) / len(values), 1e-4)
                for low, high in pairwise(cuts)
            ]
            for values in (train, other)
        ]
        found, expected = report.numeric[0].drift[split], stats.ks_2samp(train, other)
        assert found.psi == pytest.approx(psi(*shares), rel=1e-9)
        assert found.ks == pytest.approx(expected.statistic)
        assert found.p_value == pytest.approx(expected.pvalue, abs=0.02)


def test_only_a_shifted_column_is_called_drifting(tmp_path):
    rng = np.random.default_rng(0)
    folder = write(
        tmp_path,
        {
            split: rows(
                split, n, same=rng.normal(size=n), moved=rng.normal(size=n) + (split == "test"),
                gone=np.where(rng.random(n) < (0.5 if split == "test" else 0.1), np.nan, 1),
            )
            for split, n in (("train", 300), ("validation", 150), ("test", 150))
        },
    )  # fmt: skip
    report = look(folder)
    assert {"drift", "missing_drift"} <= set(kinds(report))
    assert re.fullmatch(r"test differs from train in moved \(PSI \d\.\d\d\)\.",
                        text_of(report, "drift"))  # fmt: skip
    assert text_of(report, "missing_drift") == (
        "test has another share of missing values than train in gone."
    )
    gone = report.numeric[2].drift["test"]
    missing = [facts.missing for facts in report.numeric[2].splits.values()]
    table = [[missing[0], 300 - missing[0]], [missing[2], 150 - missing[2]]]
    assert gone.missing_p_value == pytest.approx(stats.chi2_contingency(table).pvalue)


def test_columns_without_values_and_with_one_value_have_no_figures_that_are_none(tmp_path):
    empty, same = [float("nan")] * 20, [7.5] * 20
    folder = write(tmp_path, {s: rows(s, 20, empty=empty, same=same) for s in SPLITS})
    report = look(folder)
    nothing, constant = report.numeric
    assert nothing.splits["train"].mean is None
    assert (nothing.drift["test"].psi, nothing.leak.auc, nothing.leak.suspect) == (
        None,
        None,
        False,
    )
    assert (constant.splits["train"].std, constant.drift["test"].psi) == (0, 0)
    assert sum(constant.splits["train"].histogram) == 20
    assert text_of(report, "mostly_missing") == "Mostly missing in train: empty (100%)."
    assert text_of(report, "constant") == "Only one value in train: same."


# -- leaks ----------------------------------------------------------------------------------------


def test_a_columns_auc_is_that_of_its_ranks(harmless, tmp_path):
    report = look(harmless, output=str(tmp_path))
    rows_ = pa.concat_tables(stored(harmless, split) for split in SPLITS)
    label = rows_["label"].to_numpy()
    for facts in report.numeric:
        value = rows_[facts.column].to_numpy()
        there = ~np.isnan(value)
        pairs = stats.mannwhitneyu(value[there & (label == 1)], value[there & (label == 0)])
        area = pairs.statistic / (there & (label == 1)).sum() / (there & (label == 0)).sum()
        assert facts.leak.auc == pytest.approx(area, rel=1e-12)
        gap = np.mean(~there[label == 1]) - np.mean(~there[label == 0])
        assert facts.leak.missing_auc == pytest.approx(0.5 + gap / 2, rel=1e-12)
        assert not facts.leak.suspect


def test_a_column_that_alone_predicts_the_label_is_a_suspect_in_either_direction(tmp_path):
    rng = np.random.default_rng(0)

    def columns(count: int) -> dict[str, Any]:
        label = np.arange(count) % 2
        return {
            "price": 100 - 50 * label + rng.random(count),
            "paid_on": np.where(label, rng.random(count), np.nan),
            "fair": rng.normal(size=count) + label,
        }

    folder = write(tmp_path, {split: rows(split, 40, **columns(40)) for split in SPLITS})
    report = look(folder)
    leaks = [finding.text for finding in report.findings if finding.kind == "leak"]
    assert len(leaks) == 2
    assert leaks[0].startswith("price alone predicts the label: its value has an AUC of 0.0000.")
    assert leaks[1].startswith(
        "paid_on alone predicts the label: whether it is missing has an AUC of 0.0000."
    )
    assert report.findings[0].severity == "warning"


def test_so_few_rows_that_chance_sorts_them_are_no_suspicion(tmp_path):
    value = [0.0, 1.0] * 4 + [float("nan")] * 32
    folder = write(tmp_path, {"train": rows("train", 40, rare=value)})
    report = look(folder)
    assert report.numeric[0].leak.auc == 1
    assert "leak" not in kinds(report)


# -- words ----------------------------------------------------------------------------------------


def words(split: str, count: int, tells: bool = False) -> list[str | None]:
    rng = np.random.default_rng(len(split))
    names = rng.choice(["brick", "wood", "stone", "glass"], count, p=[0.4, 0.3, 0.2, 0.1])
    found: list[str | None] = [f"{'yes' if i % 2 else 'no'}" if tells else str(name)
                               for i, name in enumerate(names)]  # fmt: skip
    found[3], found[4] = None, f"only here: {split}"
    return found


def test_figures_of_words_are_those_of_a_count_by_hand(tmp_path):
    sizes = {"train": 120, "validation": 60, "test": 50}
    data = {split: rows(split, n, wall=words(split, n)) for split, n in sizes.items()}
    report = look(write(tmp_path, data, categorical=("wall",)))
    (facts,) = report.categorical
    texts = {split: data[split]["wall"] for split in SPLITS}
    assert facts.num_words == 4
    assert list(facts.splits["train"].top) == ["brick", "wood", "stone", "glass"]
    for split, found in facts.splits.items():
        assert (found.num_rows, found.missing, found.unknown) == (sizes[split], 1, 1)
        assert found.top == {word: texts[split].count(word) for word in found.top}
    tops = [list(facts.splits[s].top.values()) for s in ("train", "test")]
    shares = [[max(n / (sum(top) + 1), 1e-4) for n in (*top, 0, 1)] for top in tops]
    assert facts.drift["test"].psi == pytest.approx(psi(*shares))
    counts = [[*top, 1] for top in tops]
    assert facts.drift["test"].p_value == pytest.approx(stats.chi2_contingency(counts).pvalue)
    assert facts.drift["test"].ks is None
    assert not facts.drift["test"].values_drifted


def test_the_auc_of_words_is_the_training_share_of_positives_measured_on_other_splits(tmp_path):
    sizes = {"train": 120, "validation": 60, "test": 50}
    data = {split: rows(split, n, wall=words(split, n)) for split, n in sizes.items()}
    (facts,) = look(write(tmp_path, data, categorical=("wall",))).categorical
    known = set(facts.splits["train"].top)
    by_word = defaultdict(list)
    for word, label in zip(data["train"]["wall"], data["train"]["label"], strict=True):
        by_word[word if word in known or word is None else "other"].append(label)
    scores: dict[int, list[float]] = {0: [], 1: []}
    for split in ("validation", "test"):
        for word, label in zip(data[split]["wall"], data[split]["label"], strict=True):
            mine = by_word[word if word in known or word is None else "other"]
            scores[label].append(float(np.mean(mine)))
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[1] for b in scores[0]]
    assert facts.leak.auc == pytest.approx(np.mean(pairs))


def test_words_that_stand_for_the_label_are_a_suspect(tmp_path):
    data = {s: rows(s, 400, why=words(s, 400, tells=True)) for s in SPLITS}
    data["validation"]["image"] = data["test"]["image"] = data["train"]["image"] = [
        jpeg(photo(0))
    ] * 400
    report = look(write(tmp_path, data, categorical=("why",)))
    assert text_of(report, "leak").startswith("why alone predicts the label: its value has an AUC")


def test_words_that_another_split_uses_otherwise_drift(tmp_path):
    data = {s: rows(s, 80, wall=["brick", "brick", "wood", "stone"] * 20) for s in SPLITS}
    data["test"]["wall"] = ["brick", "straw", "straw", "stone"] * 20
    report = look(write(tmp_path, data, categorical=("wall",)))
    assert text_of(report, "drift").startswith("test differs from train in wall (PSI ")
    assert report.categorical[0].splits["test"].unknown == 40


# -- images ---------------------------------------------------------------------------------------


def test_the_perceptual_hash_is_that_of_scipys_cosine_transform():
    small = np.random.default_rng(0).integers(0, 256, (20, 32, 32)).astype(np.uint8)
    for found, pixels in zip(perceptual_hashes(small), small, strict=True):
        low = fft.dctn(pixels.astype(np.float64), norm="ortho")[:8, :8].ravel()
        bits = "".join("1" if value > np.median(low) else "0" for value in low)
        assert int(found) == int(bits, 2)


def test_the_search_finds_every_neighbour_that_comparing_all_finds():
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


def test_a_search_among_images_that_all_look_alike_ends_and_says_so():
    hashes = np.arange(1000, dtype=np.uint64)
    _, _, complete = nearest_hashes(hashes, hashes, most_compared=10_000)
    assert not complete


def test_the_same_and_nearly_the_same_images_in_two_splits_are_found_with_their_rows(tmp_path):
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
        "1 image is in test and in train: the same bytes, such as 'test-4' and 'train-9'."
    )
    assert text_of(report, "conflicting_labels").startswith("2 images are in rows of both classes")
    page = (tmp_path / "inspect.html").read_text()
    assert page.count("card pair") == 3
    assert "labels differ" in page


def test_images_repeated_within_a_split_are_counted(tmp_path):
    data = {split: rows(split, 20) for split in SPLITS}
    data["train"]["image"][2] = data["train"]["image"][4] = data["train"]["image"][0]
    report = look(write(tmp_path, data))
    assert report.duplicates.within == {"train": 2, "validation": 0, "test": 0}
    assert report.duplicates.conflicting == 0
    assert kinds(report) == ["repeated_image"]


def test_black_white_flat_and_unreadable_images_are_counted_and_never_near(tmp_path):
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
        "3 images are unreadable in image (train 2, test 1)."
    )
    assert text_of(report, "black_image") == "2 images are black in image (train 1, test 1)."


def test_raw_pixels_and_several_images_a_row_are_looked_at_column_by_column(tmp_path):
    info = ImageInfo(encoding="raw", height=12, width=20, names=("front", "back"))

    def pair(split: str) -> dict[str, Any]:
        found = rows(split, 15)
        del found["image"]
        start = SPLITS.index(split) * 1000
        pixels = [cv2.resize(photo(start + i), (20, 12)) for i in range(30)]
        found["image_front"] = [image.tobytes() for image in pixels[:15]]
        found["image_back"] = [image.tobytes() for image in pixels[15:]]
        found["image_back"][2] = None
        return found

    data = {split: pair(split) for split in SPLITS}
    data["test"]["image_back"][5] = data["train"]["image_front"][6]
    report = look(write(tmp_path, data, image=info))
    front, back = report.images
    assert (front.column, back.column) == ("image_front", "image_back")
    assert (front.splits["train"].missing, back.splits["train"].missing) == (0, 1)
    grey = [
        np.frombuffer(content, np.uint8).reshape(-1, 3) @ np.array([0.299, 0.587, 0.114])
        for content in data["train"]["image_front"]
    ]
    assert front.brightness.splits["train"].mean == pytest.approx(
        np.mean([image.mean() for image in grey]), abs=0.05
    )
    assert front.contrast.splits["train"].mean == pytest.approx(
        np.mean([image.std() for image in grey]), abs=0.05
    )
    (same,) = [pair for o in report.duplicates.overlaps for pair in o.examples if pair.exact]
    assert (same.first.column, same.second.column) == ("image_front", "image_back")
    assert (same.first.row, same.second.row) == (6, 5)


def test_the_contact_sheet_shows_rows_of_each_split_and_class(tmp_path):
    report = look(write(tmp_path, {split: rows(split, 30) for split in SPLITS}))
    for split in SPLITS:
        for label in (0, 1):
            shown = [r for r in report.contact_sheet if (r.split, r.label) == (split, label)]
            keys = [f"{split}-{i}" for i in range(30) if i % 2 == label]
            assert [ref.key for ref in shown] == sorted(keys, key=hash_key)[:8]


# -- keys, quarantine, samples ------------------------------------------------------------------


def test_a_key_in_two_splits_is_named(tmp_path):
    data = {split: rows(split, 20) for split in SPLITS}
    data["test"]["key"][3] = "train-5"
    report = look(write(tmp_path, data))
    assert report.keys.num_shared == 1
    assert text_of(report, "shared_key") == (
        "1 key is in more than one split, such as 'train-5' in train and test."
    )


def test_the_quarantine_is_shown_by_reason_with_examples(tmp_path):
    bad: list[tuple[str | None, str, str]] = [
        (f"bad-{i}", "missing_image", f"{i}.jpg: no such file") for i in range(7)
    ]
    bad.append((None, "missing_key", "row 12"))
    folder = write(tmp_path, {s: rows(s, 20) for s in SPLITS}, quarantine=bad)
    report = look(folder)
    assert [(q.reason, q.num_rows, len(q.examples)) for q in report.quarantine] == [
        ("missing_image", 7, 5), ("missing_key", 1, 1),
    ]  # fmt: skip
    assert report.quarantine[1].examples[0].detail == "row 12"
    assert text_of(report, "quarantine") == (
        "8 of 68 rows (11.76%) are in quarantine: missing_image 7, missing_key 1."
    )
    assert "0.jpg: no such file" in (folder / "inspect.html").read_text()


def test_of_a_large_split_a_sample_by_hash_of_the_key_is_looked_at(tmp_path):
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
    assert text_of(report, "sample").startswith(f"Looked at a sample of rows: {len(chosen)} of 400")


def test_classes_that_are_more_common_in_one_split_are_pointed_out(tmp_path):
    data = {split: rows(split, 100) for split in SPLITS}
    data["test"]["label"] = [int(i % 10 > 0) for i in range(100)]
    report = look(write(tmp_path, data))
    assert text_of(report, "label_drift") == "90.0% of test are 'yes', 50.0% of train."


# -- trouble --------------------------------------------------------------------------------------


def test_a_split_without_rows_is_no_trouble(tmp_path):
    report = look(write(tmp_path, {"train": rows("train", 12, area=range(12))}))
    assert report.splits["test"].positive_share is None
    assert report.numeric[0].splits["test"].mean is None
    assert report.numeric[0].drift["test"].psi is None


def test_text_from_the_data_is_shown_and_never_obeyed(tmp_path, capsys):
    nasty = "<script>alert(1)</script>[red]'\""
    data = {s: rows(s, 20) | {nasty: np.arange(20.0)} for s in SPLITS}
    for split in SPLITS:
        data[split]["key"] = [f"{nasty}{split if i else ''}{i}" for i in range(20)]
    bad: list[tuple[str | None, str, str]] = [(nasty, "missing_image", nasty)]
    folder = write(tmp_path, data, quarantine=bad, labels=(nasty, f"{nasty}!"))
    look(folder)
    page = (folder / "inspect.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;[red]&#x27;&quot;" in page
    assert "[red]" in capsys.readouterr().out


def test_prepared_data_that_is_missing_or_damaged_says_so(tmp_path):
    with pytest.raises(JobError, match=r"no manifest\.json in .*nothing; has `python -m"):
        look(tmp_path / "nothing")
    folder = write(tmp_path / "here", {split: rows(split, 12) for split in SPLITS})
    shard = folder / "test" / "part-00000.parquet"
    size = shard.stat().st_size
    shard.write_bytes(b"x" * size)
    with pytest.raises(JobError, match=r"the shards of .*here cannot be read: .*; prepare the"):
        look(folder)
    shard.unlink()
    with pytest.raises(JobError, match=r"test/part-00000\.parquet is missing"):
        look(folder)
