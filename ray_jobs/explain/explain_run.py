"""Loads a trained model and explains it on rows of prepared data, in one process."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ray_jobs.cluster.worker_group import import_keras
from ray_jobs.config.prepare_spec import Split
from ray_jobs.data.batch import CATEGORY, IMAGE, LABEL, NUMERIC, TEXT, WEIGHT
from ray_jobs.data.manifest import Manifest
from ray_jobs.explain.explanation import Explanation
from ray_jobs.inspect.shard_scan import read_columns
from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import MODEL

SAMPLE_ROWS = 500
"""Rows that importance and partial dependence are measured on."""

_NUM_DEPENDENCES = 4
_BATCH = 32
_MAX_BYTES = 1 << 28


def explain_run(
    run: TrainedRun,
    folder: Folder,
    manifest: Manifest,
    split: Split,
    shown: Sequence[int],
    num_cpus: float,
    use_gpu: bool,
) -> Explanation:
    """Return the importance of columns, partial dependences, and explanations of some rows.

    Args:
        run: The run; its model is a `FusionModel`.
        folder: Prepared data.
        manifest: Its manifest.
        split: The split with the rows.
        shown: Indices of the rows to explain one by one; none skips them.
        num_cpus: CPUs for this process.
        use_gpu: Whether it uses a GPU.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import_keras()
    from mm_model import load_model
    from mm_model.model_parts import IMAGE_FEATURES, CutModel, column_names
    from ray_jobs.cluster.strategy import set_devices
    from ray_jobs.explain.importance import (
        IMAGE_COLUMN,
        ModelRows,
        missing_modalities,
        partial_dependence,
        permutation_importance,
    )

    set_devices(num_cpus, use_gpu)
    with tempfile.TemporaryDirectory() as local:
        model: Any = load_model(run.folder.download(MODEL, f"{local}/model.keras"))
    info = manifest.splits[split]
    cut = CutModel(model, IMAGE_FEATURES)
    num_rows = max(min(SAMPLE_ROWS, _MAX_BYTES // max(cut.row_bytes, 1)), 1)
    chosen = np.random.default_rng(0).permutation(info.num_rows)[:num_rows]
    batch = _read(run, folder, manifest, split, np.sort(chosen))
    words = {v.column: v.words for v in run.manifest.vocabularies}
    columns = {
        NUMERIC: run.manifest.numeric_columns,
        CATEGORY: tuple(words),
        TEXT: () if run.text is None else run.text.columns,
    }
    columns = {name: names for name, names in columns.items() if name in run.input_shapes}
    inputs = {name: batch[name] for name in run.input_shapes}
    rows = ModelRows(
        model=cut,
        inputs={name: values for name, values in inputs.items() if name != IMAGE},
        tensors=_tensors(cut, inputs),
        columns=columns,
        label_N=batch[LABEL][:, 0].astype(np.int64),
        weight_N=batch[WEIGHT][:, 0].astype(np.float64),
        is_image_optional=run.manifest.image.optional,
    )
    importance = permutation_importance(rows)
    leading = [n for entry in importance for n in entry["columns"]]
    changeable = [n for n in leading if n != IMAGE_COLUMN and n not in columns.get(TEXT, ())]
    dependences = [
        partial_dependence(rows, name, words.get(name, ()))
        for name in changeable[:_NUM_DEPENDENCES]
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
    own_inputs = {name: own[name] for name in run.input_shapes}
    encoded = column_names(model, run.manifest.numeric_columns, list(words))
    return replace(explanation, **_explain_rows(model, own_inputs, sorted(shown), inputs, encoded))


def _explain_rows(
    model: Any,
    inputs: dict[str, np.ndarray],
    shown: list[int],
    sample: dict[str, np.ndarray],
    encoded: dict[str, list[str]],
) -> dict[str, Any]:
    """Return the fields of an `Explanation` on single rows."""
    from mm_model.model_parts import ENCODED_COLUMNS, CutModel, has_image_map
    from ray_jobs.explain.row_maps import column_contributions, grad_cam, map_similarity

    found: dict[str, Any] = {}
    if IMAGE in inputs and has_image_map(model):
        maps = grad_cam(model, inputs)
        found["map_similarity"] = map_similarity(model, inputs, maps)
        by_row = maps.reshape(len(shown), -1, *maps.shape[1:])
        found["maps"] = dict(zip(shown, by_row, strict=True))
    if encoded:
        cut = CutModel(model, ENCODED_COLUMNS)
        average = {n: values.mean(axis=0) for n, values in _tensors(cut, sample).items()}
        contributions = column_contributions(model, inputs, encoded, average)
        found["contributions"] = dict(zip(shown, contributions, strict=True))
    return found


def _read(
    run: TrainedRun, folder: Folder, manifest: Manifest, split: Split, rows_R: np.ndarray
) -> dict[str, np.ndarray]:
    """Return some rows of a split as a batch."""
    table = read_columns(folder, manifest.splits[split], run.decoder.columns, rows_R)
    return run.decoder.decode(table)


def _tensors(cut: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors between the two parts of a model, computed batch by batch."""
    num_rows = len(next(iter(inputs.values())))
    parts = [
        cut.tensors({name: values[start : start + _BATCH] for name, values in inputs.items()})
        for start in range(0, num_rows if cut.names else 0, _BATCH)
    ]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in cut.names}
