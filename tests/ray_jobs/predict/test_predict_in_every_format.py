"""A run predicts equal probabilities for a table in every file format and for a request."""

import json
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import Phase, assume, given, settings

from ray_jobs.cluster import strategy
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import PredictSpec
from ray_jobs.config.spec import RunSpec
from ray_jobs.predict.predictor import PROBABILITY, Predictor
from ray_jobs.predict.row_sources import RawRows
from ray_jobs.predict.trained_run import open_run
from ray_jobs.prepare.job import prepare
from ray_jobs.serve.image_folders import ImageFolders
from ray_jobs.serve.request_rows import RequestReader
from tests.ray_jobs.prepare.test_same_in_every_format import FORMATS, NUM_ROWS, tables, write
from tests.ray_jobs.raw import jpeg
from tests.ray_jobs.trained import write_run


@pytest.mark.parametrize("num_tables", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_predicts_a_table_alike_in_every_format(tmp_path_factory, monkeypatch, num_tables):
    # TensorFlow accepts the devices of a process only once.
    monkeypatch.setattr(strategy, "set_devices", lambda *_: None)

    # A search for a smaller example would take minutes.
    @settings(max_examples=num_tables, deadline=None, phases=[Phase.generate])
    @given(tables())
    def check(columns: dict[str, list[Any]]) -> None:
        folder = tmp_path_factory.mktemp("table")
        (folder / "images").mkdir()
        for i, key in enumerate(columns["key"]):
            (folder / "images" / f"{key}.jpg").write_bytes(jpeg(i))
        for name in FORMATS:
            write(folder / name, columns)
        options = {"images": folder / "images", "columns": "auto", "image_size": 16}
        options = {
            **options,
            "dry_run": True,
            "table": folder / FORMATS[0],
            "max_bad_fraction": 0.9,
        }
        spec = RunSpec.model_validate({"prepare": {n: str(v) for n, v in options.items()}})
        try:
            manifest = prepare(spec)
        except JobError as error:
            assume("no column is left" not in str(error))
            raise
        write_run(folder / "run", manifest)
        run = open_run(str(folder / "run"))
        predictor = Predictor(run, NUM_ROWS, 1, use_gpu=False)
        found = []
        for name in FORMATS:
            place = {"data": str(folder / name), "images": str(folder / "images")}
            rows = RawRows(run, PredictSpec(run=str(folder / "run"), output="", **place))
            (task,) = rows.tasks()
            predicted = pa.concat_tables(predictor(pa.concat_tables(rows.read(task))))
            found.append(predicted.to_pylist())
        cells = json.loads(json.dumps(columns, default=str))
        requested = [
            dict(zip(cells, row, strict=True)) | {"image": jpeg(i)}
            for i, row in enumerate(zip(*cells.values(), strict=True))
        ]
        reader = RequestReader(run, ImageFolders((), 0))
        table = reader.read([reader.prepare_images(row) for row in requested])
        answers = pa.concat_tables(predictor(table)).to_pylist()
        keys = [reader.key(row, position) for position, row in enumerate(requested)]
        found.append([{**row, "key": key} for row, key in zip(answers, keys, strict=True)])
        assert len({row[PROBABILITY] for row in found[0]}) > 1
        for name, other in zip((*FORMATS, "a request"), found, strict=True):
            # As text, because the logits of extreme numbers can be NaN.
            assert list(map(str, other)) == list(map(str, found[0])), name

    check()
