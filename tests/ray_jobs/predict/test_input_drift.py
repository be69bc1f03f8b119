from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_jobs.data.manifest import Manifest
from ray_jobs.data.reader import sample_columns
from ray_jobs.predict.input_drift import drift_findings, input_drift
from ray_jobs.predict.trained_run import TrainedRun, open_run
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import REFERENCE, read_sample, write_reference, write_validation
from tests.ray_jobs.tiny import COLUMNS, write_prepared
from tests.ray_jobs.trained import write_run

NUM_ROWS = 400


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[TrainedRun, Path, Manifest]:
    """A run with reference and validation rows, its data, and their manifest."""
    folder = tmp_path_factory.mktemp("drift")
    manifest = write_prepared(folder / "prepared", {"train": NUM_ROWS, "validation": 20, "test": 9})
    write_run(folder / "run", manifest)
    run = open_run(str(folder / "run"))
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(NUM_ROWS, len(run.heads)))
    write_reference(run.folder, Folder(folder / "prepared"), manifest)
    write_validation(run.folder, np.zeros(NUM_ROWS), np.full(NUM_ROWS, 0.5), None, logits)
    return run, folder / "prepared", manifest


def findings(run: TrainedRun, numbers: dict[str, Any], logits: np.ndarray) -> dict[str, str]:
    return {f.code: f.text for f in drift_findings(input_drift(run, numbers, {}, logits))}


def test_the_reference_is_a_sample_of_the_training_rows(finished, tmp_path):
    run, prepared, manifest = finished
    reference = read_sample(run.folder, REFERENCE)
    assert reference is not None
    assert reference.column_names == list(COLUMNS)
    assert reference.num_rows == NUM_ROWS
    shards = manifest.splits["train"].shards
    few = sample_columns(Folder(prepared), shards, ["key", *COLUMNS], 50)
    assert len(set(few["key"].to_pylist())) == few.num_rows == 50
    assert read_sample(Folder(tmp_path), REFERENCE) is None


def test_columns_missing_values_and_heads_that_differ_are_found(finished):
    run, _, _ = finished
    reference: Any = read_sample(run.folder, REFERENCE)
    same = {name: reference[name].to_numpy() for name in COLUMNS}
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(NUM_ROWS, len(run.heads)))
    assert findings(run, same, logits) == {}
    shifted = {**same, "beta": same["beta"] + 1}
    (text,) = findings(run, shifted, logits).values()
    assert text.startswith("1 of 6 columns and heads differ from the training rows: beta (PSI ")
    logits[:, run.heads.index("image")] += 1
    text = findings(run, same, logits)["drift"]
    assert "differ from the training rows: image head (PSI " in text
    gone = {**same, "alpha": np.where(rng.random(NUM_ROWS) < 0.5, np.nan, same["alpha"])}
    text = findings(run, gone, logits)["missing_drift"]
    assert text == (
        "The fraction of missing values in 1 column differs from the training rows: alpha"
    )


def test_words_are_compared_by_the_vocabulary_of_the_run(finished):
    from mm_model.statistics import fit_vocabulary

    run, _, manifest = finished
    words = pa.array(["a", "b"] * (NUM_ROWS // 2))
    vocabulary = fit_vocabulary(words.to_pylist(), "word")
    with_words = TrainedRun(
        run.folder, manifest.model_copy(update={"vocabularies": (vocabulary,)}), 0.5, {}
    )
    reference: Any = read_sample(run.folder, REFERENCE)
    stream = pa.BufferOutputStream()
    pq.write_table(reference.append_column("word", words), stream)
    run.folder.write_bytes(REFERENCE, stream.getvalue().to_pybytes())
    for given, drifts in ((words, False), (pa.array(["a"] * 390 + ["new"] * 10), True)):
        (entry,) = input_drift(with_words, {}, {"word": given}, np.zeros((0, 0)))
        assert entry["values_drifted"] == drifts


def test_few_rows_have_no_drift(finished):
    run, _, _ = finished
    numbers = {name: np.full(20, 100.0) for name in COLUMNS}
    assert input_drift(run, numbers, {}, np.zeros((20, len(run.heads)))) == []
