"""Tests the dry run of `prepare`, and the findings that `inspect` and `doctor` share with it."""

import re

import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.doctor.job import DoctorSpec, findings
from tests.ray_jobs.raw import Raw


@pytest.fixture
def raw(tmp_path) -> Raw:
    return Raw(tmp_path).add(range(60))


def test_a_dry_run_gives_the_manifest_without_shards_and_writes_nothing(raw, ray_local, capsys):
    for row in raw.rows:
        row["price"] = f"${row['rooms']},000"
    before = set(raw.folder.rglob("*"))
    dry = raw.prepare(dry_run=True)
    shown = capsys.readouterr().out
    assert set(raw.folder.rglob("*")) - before == {raw.folder / "table.csv"}
    assert "Dry run, nothing was written" in shown
    assert "add --prepare.number_rules '{price: money}'" in shown
    assert "✓ findings            none" in shown
    written = raw.prepare()
    assert dry.columns == written.columns
    assert dry.statistics == written.statistics
    for split, info in written.splits.items():
        assert dry.splits[split] == info.model_copy(update={"shards": ()})


def test_a_dry_run_prints_every_kind_of_problem_and_fails(raw, capsys):
    raw.image("k1", b"no photo")
    raw.rows[2]["key"] = "absent"
    raw.rows[3]["label"] = ""
    for row in raw.rows:
        row["split"] = "test" if row["label"] == 1 else "train"
    message = (
        "3 errors, the first: rows: missing_image: 1 of 60 rows, such as 'absent', absent.jpg: no"
    )
    with pytest.raises(JobError, match=re.escape(message)):
        raw.prepare(dry_run=True, split_column="split")
    assert not raw.out().exists()
    shown = re.sub(r"\n +→ ", " → ", capsys.readouterr().out)
    assert (
        "✗ rows                missing_label: 1 of 60 rows, such as 'k3', label is empty → set"
        in shown
    )
    assert (
        "! images              unreadable_image: 1 in a sample of 58 rows, such as k1.jpg" in shown
    )
    assert re.search(r"✗ splits +class 1 occurs in only 0 training rows, but .* → add some", shown)


def test_images_shared_between_given_splits_are_counted(raw, capsys):
    splits = ("train", "train", "validation", "test")
    for i, row in enumerate(raw.rows):
        row |= {"split": splits[i % 4], "photo": f"k{i}.jpg"}
    raw.rows[4]["photo"] = raw.rows[5]["photo"] = "k0.jpg"
    options = {"dry_run": True, "image_column": "photo", "split_column": "split"}
    raw.prepare(**options)
    assert "splits: from the column split\n" in capsys.readouterr().out
    raw.rows[6]["photo"] = "k0.jpg"
    raw.prepare(**options)
    assert "split; 4 rows with an image of another split\n" in capsys.readouterr().out


def test_a_dry_run_prints_a_maximum_number_of_findings_and_counts_all(raw, capsys, monkeypatch):
    monkeypatch.setattr("ray_jobs.prepare.dry_run._MAX_FINDINGS", 1)
    for n in range(20):
        (raw.folder / "images" / f"k{n}.jpg").unlink()
    raw.rows[30]["label"] = ""
    with pytest.raises(JobError, match=r"^2 errors, .* 20 of 60 rows, such as 'k0'"):
        raw.prepare(dry_run=True)
    assert capsys.readouterr().out.count("✗") == 1


def test_the_doctor_examines_raw_data_before_they_are_prepared_and_the_manifest_after(
    raw, ray_local
):
    raw.rows[3]["label"] = ""
    for i, row in enumerate(raw.rows):
        row["city"] = ("Lima", "Oslo")[i % 2]
    spec = DoctorSpec.model_validate(
        raw.spec(max_bad_fraction=0.1).overlay({"data.prepared": str(raw.out())}).model_dump()
    )
    found = {(f.code, f.severity): f for f in findings(spec)}
    assert "has no manifest.json" in found["manifest", "error"].text
    assert "missing_label: 1 of 60 rows, such as 'k3'" in found["rows", "warning"].text
    raw.prepare(max_bad_fraction=0.1)
    found = {f.code: f for f in findings(spec)}
    assert found["manifest"].severity == "ok"
    assert found["rows"].text == "missing_label: 1 of 60 rows"
    assert found["columns"].text == "1 column left out: city (2 words such as 'Lima')"
    assert found["columns"].remedy == "to use them, add --data.categorical city"
