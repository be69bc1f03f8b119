"""Tests which files `prepare` keeps when rows change, and when an earlier run was interrupted."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.data.manifest import Manifest
from ray_jobs.prepare import job as prepare_job
from ray_jobs.prepare import journal
from tests.ray_jobs.raw import Raw, files, quarantine, shard_rows, split_of

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture
def raw(tmp_path: Path) -> Raw:
    return Raw(tmp_path / "raw").add(range(48))


def shards(manifest: Manifest) -> dict[str, str]:
    return {s.path: s.sha256 for info in manifest.splits.values() for s in info.shards}


def shards_with(raw: Raw, manifest: Manifest, key: str) -> set[str]:
    return {
        path
        for path in shards(manifest)
        if key in pq.read_table(raw.out() / path)["key"].to_pylist()
    }


def all_files(folder: Path) -> dict[str, bytes]:
    return files(folder) | {"manifest.json": (folder / "manifest.json").read_bytes()}


def test_preparing_the_same_data_again_keeps_every_file(raw):
    raw.image("k5", b"no photo")
    raw.prepare(max_bad_fraction=0.1)
    before = all_files(raw.out())
    times = {path: path.stat().st_mtime_ns for path in raw.out().glob("t*/*.parquet")}
    raw.prepare(max_bad_fraction=0.1)
    assert all_files(raw.out()) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_ray_is_not_started_if_there_is_nothing_to_do(raw, monkeypatch):
    before = raw.prepare()
    monkeypatch.delattr(prepare_job.connection, "connected")
    assert raw.prepare() == before


def test_new_rows_go_into_additional_shards(raw):
    before = raw.prepare()
    old = split_of(raw.out(), before)
    raw.add(range(48, 90))
    after = raw.prepare()
    assert shards(before).items() <= shards(after).items()
    new = split_of(raw.out(), after)
    assert {key: new[key] for key in old} == old
    assert new.keys() == {row["key"] for row in raw.rows}
    added = shards(after).keys() - shards(before).keys()
    for path in added:
        assert not set(pq.read_table(raw.out() / path)["key"].to_pylist()) & old.keys()


@pytest.mark.parametrize(("column", "value"), [("area", "77"), ("label", None), ("area", "")])
def test_a_changed_row_rewrites_only_its_shard(raw, column, value):
    before = raw.prepare()
    row = raw.rows[10]
    row[column] = 1 - row["label"] if value is None else value
    after = raw.prepare()
    lost = shards(before).keys() - shards(after).keys()
    fresh = Raw(raw.folder.parent / "fresh").add(range(48))
    assert lost == shards_with(fresh, fresh.prepare(), "k10")
    stored = {r["key"]: r for t in shard_rows(raw.out(), after).values() for r in t.to_pylist()}
    assert stored["k10"][column] == (float(row[column]) if row[column] != "" else None)
    assert len(stored) == 48
    assert after.cuts == before.cuts


def test_a_row_removed_from_the_table_is_removed_from_the_data(raw):
    before = raw.prepare()
    lost = shards_with(raw, before, "k20")
    del raw.rows[20]
    after = raw.prepare()
    assert shards(before).keys() - shards(after).keys() == lost
    assert split_of(raw.out(), after).keys() == {row["key"] for row in raw.rows}
    assert sum(info.num_rows for info in after.splits.values()) == 47


def test_statistics_and_counts_cover_old_and_new_rows(raw):
    raw.prepare()
    raw.add(range(48, 90))
    again = raw.prepare()
    # The cuts come from the first rows, so prepare the same splits at once by a column.
    for row in raw.rows:
        row["fold"] = split_of(raw.out(), again)[row["key"]]
    at_once = raw.prepare("once", split_column="fold")
    assert again.statistics == at_once.statistics
    for split, info in again.splits.items():
        assert info.class_counts == at_once.splits[split].class_counts


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


def test_a_deleted_shard_is_written_again(raw):
    before = raw.prepare()
    expected = all_files(raw.out())
    path = before.splits["train"].shards[-1].path
    (raw.out() / path).unlink()
    raw.prepare()
    assert all_files(raw.out()) == expected


def test_a_repaired_image_is_added(raw):
    repaired = (raw.folder / "images" / "k7.jpg").read_bytes()
    raw.image("k7", b"no photo")
    before = raw.prepare(max_bad_fraction=0.1)
    raw.image("k7", repaired)
    after = raw.prepare(max_bad_fraction=0.1)
    assert quarantine(raw.out()) == {}
    assert "k7" in split_of(raw.out(), after)
    assert shards(before).items() <= shards(after).items()


class Stopped(Exception):
    """Interrupts a prepare."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that interrupts `prepare` after some shards."""

    def stop(num_shards: int) -> None:
        original = prepare_job._write_shards

        def few(*args: Any) -> Any:
            for number, facts in enumerate(original(*args)):
                if number == num_shards:
                    raise Stopped
                yield facts

        monkeypatch.setattr(prepare_job, "_write_shards", few)

    return stop


def test_a_resumed_prepare_keeps_finished_shards_and_gives_the_same_result(
    raw, stop_after, monkeypatch
):
    raw.image("k5", b"no photo")
    raw.prepare("whole", max_bad_fraction=0.1)
    stop_after(3)
    with pytest.raises(Stopped):
        raw.prepare(max_bad_fraction=0.1)
    assert not (raw.out() / "manifest.json").exists()
    monkeypatch.undo()
    finished = journal.read_finished(prepare_job.Folder(raw.out()))
    assert len(finished) >= 3
    times = {path: path.stat().st_mtime_ns for path in raw.out().glob("t*/*.parquet")}
    # A killed writer leaves a partial file.
    partial = raw.out() / "train" / "part-00000-12345678.parquet.99.partial"
    partial.write_bytes(b"PAR1")
    raw.prepare(max_bad_fraction=0.1)
    done = {facts.shard.path for facts in finished.values() if facts.shard}
    for path, time in times.items():
        if str(path.relative_to(raw.out())) in done:
            assert path.stat().st_mtime_ns == time
    found, expected = all_files(raw.out()), all_files(raw.out("whole"))
    output = f'"output": "{raw.out("whole")}"', f'"output": "{raw.out()}"'
    expected["manifest.json"] = expected["manifest.json"].decode().replace(*output).encode()
    assert found == expected


def test_rows_changed_since_the_interruption_are_written_anew(raw, stop_after, monkeypatch):
    stop_after(6)
    with pytest.raises(Stopped):
        raw.add(range(48, 90)).prepare()
    raw.rows[10]["area"] = "123"
    monkeypatch.undo()
    manifest = raw.prepare()
    stored = {r["key"]: r for t in shard_rows(raw.out(), manifest).values() for r in t.to_pylist()}
    assert stored["k10"]["area"] == 123
    assert set(files(raw.out())) == {*shards(manifest), "quarantine/part-00000.parquet"}


def test_a_finished_but_damaged_shard_is_written_again(raw, stop_after, monkeypatch):
    raw.prepare("whole")
    stop_after(5)
    with pytest.raises(Stopped):
        raw.prepare()
    monkeypatch.undo()
    for path in raw.out().glob("t*/*.parquet"):
        path.write_bytes(b"PAR1")
    for path in list(raw.out().glob("_progress/*"))[:1]:
        path.write_text("{")
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
    splits_of = defaultdict(set)
    for row in raw.rows:
        splits_of[row["photo"].removeprefix("./")].add(new[row["key"]])
    assert len(splits_of) == 32
    assert all(len(splits) == 1 for splits in splits_of.values())
