"""Tests which files `prepare` keeps when rows change, and when an earlier run was interrupted."""

from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.data.manifest import Manifest
from ray_jobs.prepare.shards import shard_tasks
from ray_jobs.storage.folder import Folder
from tests.ray_jobs.raw import (
    ROWS_PER_SHARD,
    Raw,
    files,
    jpeg,
    quarantine,
    rows_by_key,
    shard_rows,
    split_of,
)

pytestmark = pytest.mark.usefixtures("ray_local")


def shards(manifest: Manifest) -> dict[str, str]:
    return {s.path: s.sha256 for info in manifest.splits.values() for s in info.shards}


def shards_with(raw: Raw, manifest: Manifest, key: str) -> set[str]:
    return {
        path
        for path in shards(manifest)
        if key in pq.read_table(raw.out() / path)["key"].to_pylist()
    }


def small_shards(manifest: Manifest) -> set[str]:
    """Return the shards that can be merged with new rows."""
    every = [shard for info in manifest.splits.values() for shard in info.shards]
    return {shard.path for shard in every if 2 * shard.num_rows < ROWS_PER_SHARD}


def all_files(folder: Path) -> dict[str, bytes]:
    return files(folder) | {"manifest.json": (folder / "manifest.json").read_bytes()}


def times_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("[tv]*/*.parquet")}


def test_preparing_the_same_data_again_does_not_start_ray_and_keeps_every_file(raw, monkeypatch):
    manifest = raw.prepare()
    before, times = all_files(raw.out()), times_of(raw.out())
    monkeypatch.delattr(shard_tasks.connection, "connected")
    assert raw.prepare() == manifest
    assert all_files(raw.out()) == before
    assert times_of(raw.out()) == times
    monkeypatch.undo()
    # Only a deleted shard is written again.
    (raw.out() / manifest.splits["train"].shards[-1].path).unlink()
    raw.prepare()
    assert all_files(raw.out()) == before
    assert len(times_of(raw.out()).items() - times.items()) == 1


@pytest.mark.parametrize(
    ("column", "cell", "stored"),
    [("area", "77", 77), ("area", "", None), ("label", "1", 1), ("key", "new", "new")],
)
def test_a_changed_or_renamed_row_rewrites_only_its_shard(raw, column, cell, stored):
    before = raw.prepare()
    changed = shards_with(raw, before, "k10")
    raw.image("new", jpeg(0))
    raw.rows[10][column] = cell
    after = raw.prepare()
    assert after.cuts == before.cuts
    assert shards(before).keys() - shards(after).keys() == changed
    rows = rows_by_key(raw.out(), after)
    assert rows.keys() == {row["key"] for row in raw.rows}
    assert rows[raw.rows[10]["key"]][column] == stored


def test_new_rows_go_into_additional_shards_and_are_counted_with_the_old_ones(raw):
    before = raw.prepare()
    old, changed = split_of(raw.out(), before), shards_with(raw, before, "k0")
    raw.add(range(48, 120))
    raw.rows[0]["label"] = 1 - raw.rows[0]["label"]
    after = raw.prepare()
    new = split_of(raw.out(), after)
    assert after.cuts == before.cuts
    assert {key: new[key] for key in old} == old
    assert {new[key] for key in new.keys() - old.keys()} == set(SPLITS)
    assert new.keys() == {row["key"] for row in raw.rows}
    rewritten = shards(before).keys() - shards(after).keys()
    assert changed <= rewritten <= changed | small_shards(before)
    # The cuts come from the first rows, so prepare the same splits at once by a column.
    for row in raw.rows:
        row["fold"] = new[row["key"]]
    at_once = raw.prepare("once", split_column="fold")
    assert after.statistics == at_once.statistics
    for split, info in after.splits.items():
        assert info.class_counts == at_once.splits[split].class_counts


def test_small_shards_are_merged_with_new_rows_and_no_row_changes_its_split(raw):
    manifest = raw.prepare(rows_per_shard=1000)
    for number in range(48, 60, 2):
        before, old = manifest, split_of(raw.out(), manifest)
        raw.add(range(number, number + 2))
        manifest = raw.prepare(rows_per_shard=1000)
        new = split_of(raw.out(), manifest)
        assert {key: new[key] for key in old} == old
        assert new.keys() == {row["key"] for row in raw.rows}
        # All rows of a split fit in one shard.
        assert {split: len(info.shards) for split, info in manifest.splits.items()} == {
            split: 1 for split in SPLITS
        }
        same = shards(before).keys() & shards(manifest).keys()
        grown = {new[key] for key in new.keys() - old.keys()}
        assert len(same) == len(SPLITS) - len(grown)


@pytest.mark.parametrize(
    "change",
    [{"store": "raw"}, {"image_size": 16}, {"jpeg_quality": 50}, {"numeric_columns": ["rooms"]}],
)
def test_other_settings_rewrite_every_shard_and_keep_the_splits(raw, change):
    before = raw.prepare()
    old = split_of(raw.out(), before)
    after = raw.prepare(**change)
    assert not shards(before).keys() & shards(after).keys()
    assert split_of(raw.out(), after) == old


def test_a_damaged_image_changes_no_file_until_it_is_repaired(raw):
    repaired = (raw.folder / "images" / "k7.jpg").read_bytes()
    raw.image("k7", b"no photo")
    before = raw.prepare(max_bad_fraction=0.1)
    expected = all_files(raw.out())
    raw.prepare(max_bad_fraction=0.1)
    assert all_files(raw.out()) == expected
    raw.image("k7", repaired)
    after = raw.prepare(max_bad_fraction=0.1)
    assert quarantine(raw.out()) == {}
    assert "k7" in split_of(raw.out(), after)
    rewritten = shards(before).items() - shards(after).items()
    assert {path for path, _ in rewritten} <= small_shards(before)


def test_a_later_prepare_reads_money_by_the_decimal_mark_of_the_first(raw):
    for i, row in enumerate(raw.rows):
        row["price"] = f"$1.{200 + i}"
    raw.rows[0]["price"] = "$0.50"
    first = raw.prepare(number_rules={"price": "money"})
    assert first.prepare.number_rules == {"price": "money:."}
    raw.rows[0]["price"] = "$1.000"
    again = raw.prepare(number_rules={"price": "money"})
    assert again.prepare.number_rules == {"price": "money:."}
    assert rows_by_key(raw.out(), again)["k5"]["price"] == pytest.approx(1.205)


class Stopped(Exception):
    """Interrupts a prepare."""


def prepare_and_stop(raw: Raw, num_shards: int, **options: Any) -> None:
    """Interrupt a prepare after some shards."""
    run_tasks = shard_tasks._run_tasks

    def write_few(*args: Any) -> Any:
        yield from islice(run_tasks(*args), num_shards)
        raise Stopped

    with patch.object(shard_tasks, "_run_tasks", write_few), pytest.raises(Stopped):
        raw.prepare(**options)


def test_a_resumed_prepare_keeps_finished_shards_and_gives_the_same_result(raw):
    raw.image("k5", b"no photo")
    raw.prepare("whole", max_bad_fraction=0.1)
    prepare_and_stop(raw, 3, max_bad_fraction=0.1)
    assert not (raw.out() / "manifest.json").exists()
    finished = shard_tasks.read_finished(Folder(raw.out()))
    assert len(finished) >= 3
    times = times_of(raw.out())
    # A killed writer leaves a partial file.
    partial = raw.out() / "train" / "part-00000-12345678.parquet.99.partial"
    partial.write_bytes(b"PAR1")
    raw.prepare(max_bad_fraction=0.1)
    for path in (raw.out() / facts.shard.path for facts in finished.values() if facts.shard):
        assert path.stat().st_mtime_ns == times[path]
    found, expected = all_files(raw.out()), all_files(raw.out("whole"))
    output = f'"output": "{raw.out("whole")}"', f'"output": "{raw.out()}"'
    expected["manifest.json"] = expected["manifest.json"].decode().replace(*output).encode()
    assert found == expected


def test_rows_changed_since_the_interruption_are_written_anew(raw):
    prepare_and_stop(raw.add(range(48, 90)), 6)
    raw.rows[10]["area"] = "123"
    manifest = raw.prepare()
    assert rows_by_key(raw.out(), manifest)["k10"]["area"] == 123
    assert set(files(raw.out())) == {*shards(manifest), "quarantine/part-00000.parquet"}


def test_a_finished_but_damaged_shard_is_written_again(raw):
    raw.prepare("whole")
    prepare_and_stop(raw, 5)
    for path in raw.out().glob("t*/*.parquet"):
        path.write_bytes(b"PAR1")
    next(raw.out().glob("_progress/*")).write_text("{")
    raw.prepare()
    assert files(raw.out()) == files(raw.out("whole"))


def test_a_folder_that_cannot_be_written_raises_an_error_and_can_be_fixed(raw):
    raw.out().mkdir()
    (raw.out() / "test").write_text("a file where a folder should be")
    with pytest.raises(JobError, match="could not be written"):
        raw.prepare()
    (raw.out() / "test").unlink()
    raw.prepare()
    raw.prepare("whole")
    assert files(raw.out()) == files(raw.out("whole"))


def test_rows_that_share_an_image_stay_in_one_split(raw):
    for i, row in enumerate(raw.rows):
        row["photo"] = f"{'./' * (i % 2)}k{i % 24}.jpg"
    before = raw.prepare(image_column="photo")
    old = split_of(raw.out(), before)
    assert len(set(old.values())) == 3
    raw.add(range(48, 96))
    for row in raw.rows[48:]:
        row["photo"] = f"k{int(row['key'][1:]) % 32}.jpg"
    new = split_of(raw.out(), raw.prepare(image_column="photo"))
    assert {key: new[key] for key in old} == old
    photos = {(row["photo"].removeprefix("./"), new[row["key"]]) for row in raw.rows}
    assert len(photos) == 32


def test_weights_are_stored_and_a_changed_weight_rewrites_only_its_shard(raw, capsys):
    plain = raw.prepare("plain")
    assert (
        "weight" not in pq.read_schema(raw.out("plain") / plain.splits["test"].shards[0].path).names
    )
    for i, row in enumerate(raw.rows):
        row["importance"] = 1 + i % 3
    raw.rows[7]["importance"] = -1
    changes: dict[str, Any] = {"weight_column": "importance", "max_bad_fraction": 0.1}
    manifest = raw.prepare(**changes)
    assert "row weights: column importance" in capsys.readouterr().out
    assert quarantine(raw.out()) == {
        "k7": ("bad_weight", "importance is '-1', but a weight is a positive number")
    }
    stored = rows_by_key(raw.out(), manifest)
    assert {key: row["weight"] for key, row in stored.items()} == {
        row["key"]: row["importance"] for row in raw.rows if row["key"] != "k7"
    }
    assert "importance" not in manifest.numeric_columns
    for split, table in shard_rows(raw.out(), manifest).items():
        weights, label = table["weight"].to_numpy(), table["label"].to_numpy()
        sums = (weights[label == 0].sum(), weights[label == 1].sum())
        assert manifest.splits[split].class_weights == sums
    changed = shards_with(raw, manifest, "k3")
    raw.rows[3]["importance"] = 9
    again = raw.prepare(**changes)
    assert shards(manifest).keys() - shards(again).keys() == changed
    assert rows_by_key(raw.out(), again)["k3"]["weight"] == 9
