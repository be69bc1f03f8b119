"""Writes the run folder of the mean of the folds' models, which `evaluate` and `predict` accept."""

import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from mm_model.statistics import Vocabulary
from ray_jobs.cluster.worker_group import import_keras
from ray_jobs.data.folds import FoldRows, select_rows
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.data.text_input import TOKENIZER
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import MODEL, SUMMARY, export_saved_model


def export_mean(
    rows: FoldRows,
    runs: Sequence[Folder],
    folder: Folder,
    summary: dict[str, Any],
    num_cpus: float,
) -> None:
    """Write manifest, model and summary of the mean model.

    Args:
        rows: The rows of all folds.
        runs: Run folders of the folds.
        folder: Run folder of the mean model.
        summary: Content of its summary.json.
        num_cpus: CPUs for this process.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import_keras()
    from mm_model import load_model
    from mm_model.mean_model import MeanModel
    from ray_jobs.cluster.strategy import set_devices

    set_devices(num_cpus, use_gpu=False)
    manifests = [read_manifest(run) for run in runs]
    vocabularies = _join_vocabularies(manifests)
    manifest = select_rows(rows, np.ones(rows.table.num_rows, bool))
    manifest = manifest.model_copy(update={"vocabularies": vocabularies})
    codes = [_codes(vocabularies, own.vocabularies) for own in manifests]
    with tempfile.TemporaryDirectory() as local:
        models = [
            load_model(run.download(MODEL, f"{local}/{i}.keras")) for i, run in enumerate(runs)
        ]
        takes_categories = "category" in models[0].input_names
        model = MeanModel(models, codes if takes_categories else [[]] * len(models))
        export_saved_model(model, manifest, f"{local}/model/saved_model")
        model.save(f"{local}/model/model.keras")
        folder.delete("model")
        folder.upload(f"{local}/model", "model")
    manifest.write(folder)
    if "text" in models[0].input_names:
        # The folds have the same tokenizer, since they share the words of the texts.
        folder.write_bytes(TOKENIZER, runs[0].read_bytes(TOKENIZER))
    folder.write_json(SUMMARY, summary)


def _join_vocabularies(manifests: Sequence[Manifest]) -> tuple[Vocabulary, ...]:
    """Return the vocabularies with all words that any fold has."""
    columns = zip(*(manifest.vocabularies for manifest in manifests), strict=True)
    return tuple(
        Vocabulary(
            column=of_folds[0].column, words=tuple(sorted({w for v in of_folds for w in v.words}))
        )
        for of_folds in columns
    )


def _codes(joined: Sequence[Vocabulary], own: Sequence[Vocabulary]) -> list[list[int]]:
    """Return, for each column, a fold's code of each joined code."""
    return [
        [Vocabulary.MISSING, Vocabulary.UNKNOWN, *mine.codes(all_words.words).tolist()]
        for all_words, mine in zip(joined, own, strict=True)
    ]
