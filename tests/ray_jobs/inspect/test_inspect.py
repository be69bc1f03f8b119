import json
import subprocess
import sys

import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.inspect.report_schema import Report
from tests.ray_jobs.inspect.samples import SPLITS, look, rows, write


def test_the_verb_prints_and_writes_a_page_and_the_same_figures_for_programs(
    harmless, harmless_report, tmp_path
):
    result = subprocess.run(
        [sys.executable, "-m", "ray_jobs.inspect", str(harmless), "--output", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert f"done → {tmp_path}/inspect.html" in result.stdout
    report = Report.model_validate(json.loads((tmp_path / "inspect.json").read_text()))
    assert report == harmless_report
    for finding in report.findings:
        assert finding.text in result.stdout
    assert [facts.num_rows for facts in report.splits.values()] == [203, 61, 47]
    assert report.splits["test"].share == 47 / 311
    pages = [(folder / "inspect.html").read_bytes() for folder in (tmp_path, harmless)]
    assert pages[0] == pages[1]


def test_the_default_output_is_the_prepared_folder(tmp_path, capsys):
    folder = write(tmp_path, {split: rows(split, 30) for split in SPLITS})
    report = look(folder)
    assert report.findings == ()
    assert "no findings" in capsys.readouterr().out
    assert "No findings." in (folder / "inspect.html").read_text()
    assert (folder / "inspect.json").exists()


def test_missing_or_damaged_data_is_an_error(tmp_path):
    with pytest.raises(JobError, match=r"nothing has no manifest\.json; run `python -m"):
        look(tmp_path / "nothing")
    folder = write(tmp_path / "here", {split: rows(split, 12) for split in SPLITS})
    shard = folder / "test" / "part-00000.parquet"
    size = shard.stat().st_size
    shard.write_bytes(b"x" * size)
    with pytest.raises(
        JobError, match=r"could not read the shards in .*here: .*; run `prepare` again"
    ):
        look(folder)
    shard.unlink()
    with pytest.raises(JobError, match=r"test/part-00000\.parquet is missing"):
        look(folder)
