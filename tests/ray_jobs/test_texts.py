"""Free text from the table to the probability: prepare, train, predict."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import PredictSpec
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.data.text_input import text_reader
from ray_jobs.predict.job import predict
from ray_jobs.prepare.job import prepare
from ray_jobs.storage.folder import Folder
from ray_jobs.train.job import (
    SAME_RUN,
    Run,
    begin_run,
    require_same,
    require_trainable,
    run_folder,
)
from tests.ray_jobs.raw import Raw
from tests.ray_jobs.trained import stored_rows, train_here

NOTES = ("no crack at the weld", "  heavy crack, NO rust at all ", "", "NA", "rust, \u00e9t\u00e9")


def raw(folder: Path, num_rows: int = 60) -> Raw:
    data = Raw(folder).add(range(1, num_rows + 1))
    for i, row in enumerate(data.rows):
        # A different number in each note, as in text that nobody would call a category.
        note = NOTES[i % len(NOTES)]
        row["note"] = f"{note} {i}" if len(note) > 2 else note
    return data


def spec_of(data: Raw, kind: str, **model: Any) -> RunSpec:
    prepared = str(data.out())
    return data.spec().overlay(
        {
            "run.storage_path": str(data.folder / "runs"),
            "run.name": kind,
            "data.prepared": prepared,
            "data.text": ["note"],
            "data.text_length": 8,
            "model.image.kind": "tiny",
            "model.image.weights": None,
            "model.text.kind": kind,
            "train.epochs": 2,
            "train.global_batch_size": 8,
            **model,
        }
    )


@pytest.fixture(scope="module")
def prepared(ray_local, tmp_path_factory) -> tuple[Raw, Manifest]:
    data = raw(tmp_path_factory.mktemp("texts"))
    return data, prepare(spec_of(data, "hashed"))


def test_prepare_stores_texts_and_the_words_of_the_training_split(prepared):
    data, manifest = prepared
    assert manifest.text_columns == ("note",)
    assert manifest.vocabularies == ()
    assert {"crack", "rust", "##k", "\u00e9"} < set(manifest.text_words)
    rows = stored_rows(data.out(), manifest, "train")
    assert rows.schema.field("note").type == pa.string()
    texts = dict(zip(rows["key"].to_pylist(), rows["note"].to_pylist(), strict=True))
    for i, row in enumerate(data.rows):
        if row["key"] in texts:
            note = row["note"].strip()
            assert texts[row["key"]] == (None if note in ("", "NA") else note), i


def test_a_dry_run_proposes_columns_of_text(ray_local, tmp_path, capsys):
    data = raw(tmp_path)
    prepare(data.spec(dry_run=True))
    assert "add --data.text note" in capsys.readouterr().out
    manifest = prepare(data.spec("auto", columns="auto"))
    assert manifest.text_columns == ("note",)


@pytest.mark.parametrize("kind", ["hashed", "bert_tiny"])
def test_a_table_is_predicted_like_the_prepared_rows(prepared, predict_here, kind, tmp_path):
    """By the tokenizer in the run folder; a model without numbers and images needs only text."""
    data, manifest = prepared
    only_text = {"model.numeric.kind": "none", "model.image.kind": "none"}
    spec = spec_of(data, kind, **only_text if kind == "hashed" else {})
    train_here(spec, manifest)
    run = str(data.folder / "runs" / kind)
    assert json.loads((Path(run) / "tokenizer.json").read_text())
    found = []
    for name, source in (("table", str(data.folder / "table.csv")), ("prepared", str(data.out()))):
        images = str(data.folder / "images") if name == "table" and kind == "bert_tiny" else None
        output = tmp_path / name
        predict(PredictSpec(run=run, data=source, images=images, output=str(output)))
        table = pa.concat_tables(map(pq.read_table, sorted(output.glob("*.parquet"))))
        assert table["error"].null_count == table.num_rows
        keys, probability = (table[name].to_pylist() for name in ("key", "probability"))
        found.append(dict(zip(keys, probability, strict=True)))
    from_table, from_shards = found
    assert len(set(from_table.values())) > 10
    assert from_table.keys() == from_shards.keys()
    for key, probability in from_table.items():
        assert probability == pytest.approx(from_shards[key], abs=1e-6)


def test_a_note_of_a_small_table_is_read_as_in_training(prepared, predict_here, tmp_path):
    """In a table of its own, the note "No" looks like a boolean."""
    data, manifest = prepared
    spec = spec_of(data, "hashed", **{"model.image.kind": "none", "run.name": "small"})
    train_here(spec, manifest)
    row = {**data.rows[0], "key": "k", "note": "No"}
    found = []
    for rows in ([row], [row, {**row, "key": "other", "note": "some rust"}]):
        columns = {name: [r[name] for r in rows] for name in ("key", "area", "rooms", "note")}
        table = tmp_path / f"{len(rows)}.csv"
        csv.write_csv(pa.table({n: pa.array(map(str, v)) for n, v in columns.items()}), table)
        output, run = tmp_path / f"out{len(rows)}", str(data.folder / "runs" / "small")
        predict(PredictSpec(run=run, data=str(table), output=str(output)))
        found.append(pq.read_table(output)["probability"][0].as_py())
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_run_cannot_resume_with_another_text_length(prepared):
    data, manifest = prepared
    spec = spec_of(data, "hashed", **{"run.name": "length", "data.text_length": 9})
    begin_run(spec, manifest, run_folder(spec))
    longer = Run(spec.overlay({"data.text_length": 10}), manifest, run_folder(spec))
    with pytest.raises(JobError, match=r"other settings \(data\.text_length\)"):
        require_same("run", longer, "run.yaml", SAME_RUN, {})


def test_the_tokenizer_of_pretrained_weights_is_read_from_the_run_folder(prepared, tmp_path):
    """The folder with the weights may be gone when the run ends or resumes."""
    data, manifest = prepared
    weights = tmp_path / "bert"
    weights.mkdir()
    (weights / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "crack"]))
    changes = {"model.text.weights": str(weights), "run.name": "pretrained"}
    spec = spec_of(data, "bert_tiny", **changes)
    begin_run(spec, manifest, run_folder(spec))
    shutil.rmtree(weights)
    reader = text_reader(spec, manifest)
    assert reader is not None
    assert reader.tokenizer.encode("crack", 9)[0] == [2, 4, 3]


def test_data_without_the_text_columns_of_a_run_is_rejected(prepared, tmp_path):
    data, manifest = prepared
    spec = spec_of(data, "hashed").overlay({"data.text": ["note", "title"]})
    with pytest.raises(JobError, match=r"no text column title of data\.text \(it has note\)"):
        require_trainable(spec, manifest)
    nothing = spec_of(data, "none", **{"model.image.kind": "none", "model.numeric.kind": "mlp"})
    assert text_reader(nothing, manifest) is None


def test_a_column_cannot_be_both_text_and_category(ray_local, tmp_path):
    spec = raw(tmp_path).spec(categorical=["note"]).overlay({"data.text": ["note"]})
    with pytest.raises(JobError, match=r"data\.categorical and data\.text both name 'note'"):
        prepare(spec)


def test_cut_texts_are_counted_for_all_rows_of_an_epoch(prepared):
    from ray_jobs.cluster.strategy import WorkerContext
    from ray_jobs.train.callbacks import Callbacks
    from ray_jobs.train.loop import Loop

    data, manifest = prepared
    only_text = {"model.numeric.kind": "none", "model.image.kind": "none", "train.epochs": 1}
    spec = spec_of(data, "hashed", **only_text)
    events: list[dict[str, Any]] = []

    class Posted(Callbacks):
        def post(self, event: Any) -> None:
            events.append(event)

    state = Loop(spec, manifest, WorkerContext()).run(Posted())
    reader = text_reader(spec, manifest)
    assert reader is not None
    notes = stored_rows(data.out(), manifest, "train")["note"].to_pylist()
    *_, cut = reader([notes])
    # The rows that do not fill a step open the next epoch.
    used = state.step * spec.train.global_batch_size
    assert 0 < state.history[0]["data/texts_cut"] <= cut.sum()
    assert state.history[0]["data/texts_cut"] >= cut.sum() - (len(notes) - used)
    (note,) = [event["text"] for event in events if "data.text_length" in event.get("text", "")]
    assert note.endswith("cut to data.text_length=8 tokens")


def test_the_reader_of_a_feed_can_be_sent_to_another_process(prepared):
    data, _ = prepared
    reader = text_reader(spec_of(data, "bert_tiny"), read_manifest(Folder(data.out())))
    again = pickle.loads(pickle.dumps(reader))
    for ours, theirs in zip(reader([list(NOTES)]), again([list(NOTES)]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
