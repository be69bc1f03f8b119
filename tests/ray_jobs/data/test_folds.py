"""Folds are selections of stored rows; see also tests/ray_jobs/cross_validate."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_model.statistics import fit_numeric_statistics
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import DataSpec
from ray_jobs.data.folds import Fold, FoldRows, fold_manifest, make_folds, read_fold_rows
from ray_jobs.data.loader import FeedOptions, TrainingFeed
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.data.reader import ShardReader
from ray_jobs.data.sampler import TrainingSampler
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.tiny import COLUMNS, with_image, write_prepared


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("folds") / "prepared"
    return write_prepared(folder, {"train": 101, "validation": 37, "test": 23}, weights=(1, 2, 4))


@pytest.fixture(scope="module")
def rows(manifest) -> FoldRows:
    return read_fold_rows(Folder(manifest.prepare.output), manifest)


def keys_of(manifest: Manifest, split: str) -> list[str]:
    """Return the keys of a split that a reader delivers."""
    shards = manifest.splits[split].shards
    reader = ShardReader(Folder(manifest.prepare.output), shards, ["key"])
    groups = [(i, g) for i, s in enumerate(shards) for g, n in enumerate(s.row_groups) if n]
    tables = reader.read_keys(groups)
    sizes = {(i, g): shards[i].row_groups[g] for i, g in groups}
    assert {key: table.num_rows for key, table in tables.items()} == sizes
    return [key for table in tables.values() for key in table["key"].to_pylist()]


def parts_of(fold: Fold) -> list[np.ndarray]:
    return [np.flatnonzero(m) for m in (fold.is_train_N, fold.is_validation_N, fold.is_scored_N)]


@pytest.mark.parametrize("is_grouped", [False, True])
def test_each_row_is_scored_once_per_repeat_and_groups_never_straddle(rows, is_grouped):
    if is_grouped:
        rng = np.random.default_rng(0)
        rows = replace(rows, group_N=rng.integers(0, 60, len(rows.label_N)))
    folds = make_folds(rows, 4, 2, seed=3)
    assert [fold.name for fold in folds] == [f"{r}-{i}" for r in (1, 2) for i in (1, 2, 3, 4)]
    for repeat in (0, 1):
        scored = [fold.is_scored_N for fold in folds if fold.repeat == repeat]
        assert (np.sum(scored, axis=0) == 1).all()
        # Stratified: a third of the rows are positive.
        shares = [rows.label_N[mask].mean() for mask in scored]
        np.testing.assert_allclose(shares, 1 / 3, atol=0.08 if is_grouped else 0.02)
    for fold in folds:
        parts = parts_of(fold)
        assert sorted(np.concatenate(parts)) == list(range(138))
        groups = [set(rows.group_N[part]) for part in parts]
        assert not groups[0] & groups[1]
        assert not groups[0] & groups[2]
        assert not groups[1] & groups[2]
    first, second = folds[0], folds[4]
    assert (first.is_scored_N != second.is_scored_N).any()
    again = make_folds(rows, 4, 2, seed=3)
    assert all((a.is_train_N == b.is_train_N).all() for a, b in zip(folds, again, strict=True))


def test_a_fold_column_determines_the_folds(rows):
    prepare = rows.manifest.prepare.model_copy(update={"fold_column": "cv"})
    words = np.resize(["a", "b", "c", "b"], 138)
    table = rows.table.append_column("fold", pa.array(words))
    given = FoldRows(rows.manifest.model_copy(update={"prepare": prepare}), table, rows.group_N)
    for fold, word in zip(make_folds(given, None, 1, 0), "abc", strict=True):
        assert (fold.is_scored_N == (words == word)).all()
    with pytest.raises(JobError, match=r"cv\.folds does not fit the 3 folds of the column cv"):
        make_folds(given, 5, 1, 0)
    with pytest.raises(JobError, match=r"cv\.repeats does not fit"):
        make_folds(given, 3, 2, 0)


def test_a_class_with_too_few_rows_is_reported(rows):
    few = rows.table.set_column(1, "label", pa.array(np.arange(138) < 3, pa.int8()))
    with pytest.raises(JobError, match=r"cv\.folds=5 needs .* one class has 3; lower cv\.folds"):
        make_folds(replace(rows, table=few), 5, 1, 0)
    # Three rows are enough for three folds, with one row of the class in each part.
    for fold in make_folds(replace(rows, table=few), 3, 1, 0):
        assert [int((part < 3).sum()) for part in parts_of(fold)] == [1, 1, 1]


def test_a_manifest_selects_the_rows_of_its_fold_and_describes_them(manifest, rows):
    all_keys = rows.table["key"].to_pylist()
    fold = make_folds(rows, 3, 1, 0)[1]
    selected = fold_manifest(rows, fold)
    folder = Path(manifest.prepare.output)
    stored = pa.concat_tables(
        pq.read_table(folder / shard.path)
        for split in ("train", "validation")
        for shard in manifest.splits[split].shards
    )
    parts = dict(zip(("train", "validation", "test"), parts_of(fold), strict=True))
    for split, part in parts.items():
        assert keys_of(selected, split) == [all_keys[i] for i in part]
        info = selected.splits[split]
        label, weight = (stored[name].to_numpy()[part] for name in ("label", "weight"))
        assert info.num_rows == len(part)
        assert info.class_counts == tuple(np.bincount(label))
        assert info.class_weights == pytest.approx(tuple(np.bincount(label, weight)))
    numbers = np.stack([stored[name].to_numpy()[parts["train"]] for name in COLUMNS], axis=1)
    assert selected.statistics == fit_numeric_statistics(numbers, COLUMNS)
    # A run folder contains a copy.
    copy = Folder(folder.parent / "run")
    selected.write(copy)
    assert read_manifest(copy) == selected


@pytest.mark.parametrize("num_workers", [1, 2])
def test_training_reads_only_the_training_rows_of_a_fold(rows, num_workers):
    fold = make_folds(rows, 3, 1, 0)[0]
    manifest = fold_manifest(rows, fold)
    data = DataSpec(shuffle_window_rows=16)
    sampler = TrainingSampler.of(manifest.splits["train"], 8, 0, data)
    num_steps, seen = sampler.steps_before(2), Counter[bytes]()
    for rank in range(num_workers):
        folder, options = Folder(manifest.prepare.output), FeedOptions(data=data)
        feed = TrainingFeed(folder, manifest, sampler, rank, num_workers, options)
        for batch in feed.batches(0, num_steps):
            seen.update(row.tobytes() for row in batch["numeric"])
    table = rows.table.filter(pa.array(fold.is_train_N))
    numbers = np.stack([table[name].to_numpy() for name in COLUMNS], axis=1)
    expected = {row.tobytes() for row in numbers}
    assert seen.keys() == expected
    assert sum(seen.values()) == 8 * num_steps
    assert set(seen.values()) <= {1, 2}


def test_rows_that_share_an_image_stay_together(tmp_path):
    manifest = write_prepared(tmp_path / "prepared", {"train": 40, "validation": 20, "test": 5})
    paths = [tmp_path / "prepared" / manifest.splits[s].shards[0].path for s in manifest.splits]
    tables = [pq.read_table(path) for path in paths]
    image = tables[0]["image"][3].as_py()
    pq.write_table(with_image(tables[1], 7, image), paths[1], row_group_size=5)
    rows = read_fold_rows(Folder(tmp_path / "prepared"), manifest)
    assert rows.group_N[3] == rows.group_N[40 + 7]
    assert len(np.unique(rows.group_N)) == 59


def test_shards_without_groups_must_be_prepared_again(manifest):
    prepare = manifest.prepare.model_copy(update={"group_column": "patient"})
    with pytest.raises(JobError, match=r"has no column 'group'.*; prepare the data again"):
        read_fold_rows(Folder(prepare.output), manifest.model_copy(update={"prepare": prepare}))
