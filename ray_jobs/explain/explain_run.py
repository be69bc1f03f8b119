"""Loads a trained model and explains it on rows of prepared data, in one process."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ray_jobs.cluster.worker_group import import_keras
from ray_jobs.config.prepare_spec import Split
from ray_jobs.data.batch import CATEGORY, IMAGE, LABEL, NUMERIC, TEXT
from ray_jobs.data.manifest import Manifest
from ray_jobs.explain.explanation import Explanation
from ray_jobs.inspect.shard_scan import read_columns
from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import MODEL

SAMPLE_ROWS = 500
"""Maximum number of rows that importance and partial dependence are measured on."""

_MAX_ENCODED_ROWS = 100  # texts are encoded again whenever a column changes
_NUM_DEPENDENCES = 4
_BATCH = 32
_MAX_BYTES = 1 << 28


def explain_run(
    run: TrainedRun,
    folder: Folder,
    manifest: Manifest,
    split: Split,
    weight_N: np.ndarray | None,
    shown: Sequence[int],
    num_cpus: float,
    use_gpu: bool,
) -> Explanation:
    """Return the importance of columns, partial dependences, and explanations of some rows.

    Args:
        run: The run.
        folder: Prepared data.
        manifest: Its manifest.
        split: The split with the rows.
        weight_N: Weights of the split's rows; by default, 1.
        shown: Indices of the rows to explain one by one; none skips them.
        num_cpus: CPUs for this process.
        use_gpu: Whether it uses a GPU.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import_keras()
    from mm_model import load_model
    from mm_model.mean_model import own_codes
    from mm_model.model_parts import ENCODED_COLUMNS, IMAGE_FEATURES, CutModel
    from ray_jobs.cluster.strategy import set_devices
    from ray_jobs.explain.importance import (
        ModelRows,
        UpperPart,
        missing_modalities,
        partial_dependence,
        permutation_importance,
    )

    set_devices(num_cpus, use_gpu)
    with tempfile.TemporaryDirectory() as local:
        loaded: Any = load_model(run.folder.download(MODEL, f"{local}/model.keras"))
    models = getattr(loaded, "models", [loaded])
    codes: Any = getattr(loaded, "codes", [()])
    cuts = [CutModel(model, IMAGE_FEATURES) for model in models]
    encoders = [CutModel(model, ENCODED_COLUMNS) for model in models]
    row_bytes = sum(cut.row_bytes for cut in cuts) * max(len(manifest.image.columns), 1)
    limit = _MAX_ENCODED_ROWS if models[0].text_backbone else SAMPLE_ROWS
    limit = max(min(limit, _MAX_BYTES // max(row_bytes, 1)), 1)
    num_rows = manifest.splits[split].num_rows
    chosen = np.sort(np.random.default_rng(0).permutation(num_rows)[:limit])
    batches: list[Mapping[str, Any]] = []
    tensors: list[list[Mapping[str, Any]]] = [[] for _ in models]
    for start in range(0, len(chosen), _BATCH):
        batch = _read(run, folder, manifest, split, chosen[start : start + _BATCH])
        inputs = {name: batch[name] for name in run.input_shapes}
        for own, cut, encoder, of_model in zip(tensors, cuts, encoders, codes, strict=True):
            coded = own_codes(inputs, of_model)
            own.append({**cut.tensors(coded), **encoder.tensors(coded)})
        batches.append({n: v for n, v in batch.items() if n in (*inputs, LABEL) and n != IMAGE})
    sample, values = _concatenate(batches), [_concatenate(own) for own in tensors]
    words = {v.column: v.words for v in run.manifest.vocabularies}
    columns = {
        NUMERIC: run.manifest.numeric_columns,
        CATEGORY: tuple(words),
        TEXT: () if run.text is None else run.text.columns,
    }
    columns = {name: names for name, names in columns.items() if name in run.input_shapes}
    rows = ModelRows(
        parts=[
            UpperPart(cut, {name: own[name] for name in cut.names}, of_model)
            for cut, own, of_model in zip(cuts, values, codes, strict=True)
        ],
        inputs={name: sample[name] for name in run.input_shapes if name != IMAGE},
        columns=columns,
        label_N=sample[LABEL][:, 0].astype(np.int64),
        weight_N=np.ones(len(chosen)) if weight_N is None else weight_N[chosen],
        is_image_optional=run.manifest.image.optional,
    )
    importance = permutation_importance(rows)
    leading = [n for entry in importance if not entry["is_image"] for n in entry["columns"]]
    dependences = [
        partial_dependence(rows, name, words.get(name, ()))
        for name in [n for n in leading if n not in columns.get(TEXT, ())][:_NUM_DEPENDENCES]
    ]
    explanation = Explanation(
        num_rows=len(chosen),
        importance=importance,
        missing_modalities=missing_modalities(rows),
        partial_dependence=[d for d in dependences if d is not None],
    )
    if not shown:
        return explanation
    own = _read(run, folder, manifest, split, np.array(sorted(shown)))
    inputs = {name: own[name] for name in run.input_shapes}
    is_positive_B = np.asarray(loaded(inputs))[:, 0] >= run.threshold
    found = []
    for model, encoder, of_model, means in zip(models, encoders, codes, values, strict=True):
        average = {name: means[name].mean(axis=0) for name in encoder.names}
        coded = own_codes(inputs, of_model)
        found.append(_explain_rows(run, model, coded, is_positive_B, average))
    return replace(explanation, **_mean(found, sorted(shown)))


def _explain_rows(
    run: TrainedRun,
    model: Any,
    inputs: Mapping[str, Any],
    is_positive_B: np.ndarray,
    average: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return the maps of the rows' images, their similarity, and the contributions of columns."""
    from mm_model.model_parts import column_names
    from ray_jobs.explain.row_maps import column_contributions, image_maps, map_similarity

    found: dict[str, Any] = {}
    if IMAGE in inputs:
        maps = image_maps(model, inputs, is_positive_B)
        found["map_similarity"] = map_similarity(model, inputs, maps, is_positive_B)
        found["maps"] = maps.reshape(len(is_positive_B), -1, *maps.shape[1:])
    if average:
        words = [vocabulary.column for vocabulary in run.manifest.vocabularies]
        encoded = column_names(model, run.manifest.numeric_columns, words)
        found["contributions"] = column_contributions(model, inputs, encoded, average)
    return found


def _mean(found: Sequence[Mapping[str, Any]], shown: Sequence[int]) -> dict[str, Any]:
    """Return the means over models as the fields of an `Explanation`."""
    fields: dict[str, Any] = {}
    similarities = [f["map_similarity"] for f in found if f.get("map_similarity") is not None]
    if similarities:
        fields["map_similarity"] = float(np.mean(similarities))
    if "maps" in found[0]:
        maps = np.mean([f["maps"] for f in found], axis=0)
        fields["maps"] = dict(zip(shown, maps, strict=True))
    if "contributions" in found[0]:
        rows = zip(*(f["contributions"] for f in found), strict=True)
        fields["contributions"] = {
            row: {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
            for row, parts in zip(shown, rows, strict=True)
        }
    return fields


def _concatenate(parts: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read(
    run: TrainedRun, folder: Folder, manifest: Manifest, split: Split, rows_R: np.ndarray
) -> dict[str, np.ndarray]:
    """Return some rows of a split as a batch."""
    table = read_columns(folder, manifest.splits[split], run.decoder.columns, rows_R)
    return run.decoder.decode(table)
