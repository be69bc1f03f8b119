"""A run folder that `train` finished, as those who use its model need to know it.

Reads: manifest.json, summary.json and the description in model/model.keras; no TensorFlow for that.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

from ray_jobs.config.errors import JobError
from ray_jobs.data.batch import CATEGORY, FEATURES, IMAGE, NUMERIC
from ray_jobs.data.manifest import NAME as MANIFEST
from ray_jobs.data.manifest import Manifest, read_manifest
from ray_jobs.data.reader import RowDecoder
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import MODEL, SUMMARY


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: where it is, how its rows were read, and what its model takes."""

    folder: Folder
    manifest: Manifest
    threshold: float
    """Probability from which a row counts as positive."""
    input_shapes: dict[str, tuple[int, ...]]
    """Of a row, by the model's inputs, which are named as in `ray_jobs.data.batch`."""

    @property
    def takes_images(self) -> bool:
        """Whether the model looks at images, or at features of them."""
        return IMAGE in self.input_shapes or FEATURES in self.input_shapes

    @property
    def takes_numbers(self) -> bool:
        """Whether the model looks at numbers or categories."""
        return NUMERIC in self.input_shapes or CATEGORY in self.input_shapes

    @property
    def decoder(self) -> RowDecoder:
        """What turns stored rows into the model's inputs."""
        size = self.input_shapes[IMAGE][-2] if IMAGE in self.input_shapes else None
        manifest = self.manifest
        if not self.takes_numbers:
            manifest = manifest.model_copy(update={"numeric_columns": (), "vocabularies": ()})
        return RowDecoder(manifest, with_image=self.takes_images, size=size)


def open_run(path: str) -> TrainedRun:
    """Return the run in a folder that `train` finished.

    The model's inputs are read from the file's description, so that the driver needs no TensorFlow.

    Raises:
        JobError: if there is no finished run, or its model is damaged.
    """
    folder = Folder(path)
    for name in (MANIFEST, SUMMARY, MODEL):
        if not folder.exists(name):
            state = "is not finished" if folder.exists("run.yaml") else "is no run folder"
            raise JobError(
                f"{folder} {state}: it has no {name}; give the folder "
                "<run.storage_path>/<run.name> of a finished `python -m ray_jobs.train`"
            )
    try:
        with (
            folder.filesystem.open_input_file(folder.locate(MODEL)) as file,
            zipfile.ZipFile(file) as archive,
        ):
            config = json.loads(archive.read("config.json"))
        network = config["config"]["network"]["config"]
        input_shapes = {
            layer["config"]["name"]: tuple(layer["config"]["batch_shape"][1:])
            for layer in network["layers"]
            if layer["class_name"] == "InputLayer"
        }
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise JobError(f"{folder}/{MODEL} is damaged or no fusion model: {error}") from error
    try:
        threshold = float(folder.read_json(SUMMARY)["decision_threshold"])
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{folder}/{SUMMARY} is damaged: {error}") from error
    # The statistics are in the model. Without them the run is small enough to travel inside the
    # call that starts an actor; Ray warns of a larger one, which a restart could miss.
    manifest = read_manifest(folder).model_copy(update={"statistics": None})
    return TrainedRun(folder, manifest, threshold, input_shapes)


def require_fit(run: TrainedRun, manifest: Manifest, data: Folder) -> None:
    """Check that prepared data is what the run's model takes.

    Raises:
        JobError: naming everything in which the data differs from what the run was trained on.
    """
    differences: list[str] = []
    trained = run.manifest
    if run.takes_numbers and manifest.numeric_columns != trained.numeric_columns:
        differences.append(_column_difference(manifest.numeric_columns, trained.numeric_columns))
    stored = [
        (m.image.names, m.image.width, m.image.height, m.image.features)
        for m in (manifest, trained)
    ]
    if run.takes_images and stored[0] != stored[1]:
        shown = [_images_text(m) for m in (manifest, trained)]
        differences.append(f"its images have {shown[0]}, the run's {shown[1]}")
    categories = [[v.column for v in m.vocabularies] for m in (manifest, trained)]
    if run.takes_numbers and not set(categories[1]) <= set(categories[0]):
        absent = sorted(set(categories[1]) - set(categories[0]))
        differences.append(f"it lacks the categorical columns {absent}")
    if manifest.positive_label != trained.positive_label:
        differences.append(
            f"its positive label is {manifest.positive_label!r}, the run's "
            f"{trained.positive_label!r}"
        )
    if differences:
        raise JobError(
            f"{data} does not fit the run in {run.folder}: {'; '.join(differences)}. Prepare it "
            f"by the rules that the run's {MANIFEST} holds"
        )


def _images_text(manifest: Manifest) -> str:
    image = manifest.image
    names = f" ({', '.join(image.names)})" if image.names else ""
    if image.features:
        return "{} views of {} features{}".format(*image.features, names)
    return f"{image.width} × {image.height} pixels{names}"


def _column_difference(columns: Sequence[str], trained: Sequence[str]) -> str:
    absent = [name for name in trained if name not in columns]
    unknown = [name for name in columns if name not in trained]
    if not absent and not unknown:
        return f"its numeric columns stand in the order {list(columns)}, the run's {list(trained)}"
    parts = [f"{absent} are missing"] if absent else []
    parts += [f"{unknown} are unknown to the run"] if unknown else []
    return f"of its numeric columns {' and '.join(parts)}"
