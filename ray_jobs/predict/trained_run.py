"""Opens a finished run: reads its settings for preparing rows and the inputs of its model.

Reads manifest.json, summary.json and the configuration in model/model.keras, without TensorFlow.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mm_model.backbones.tokenizer import TextReader
from ray_jobs.config.errors import JobError
from ray_jobs.data.batch import CATEGORY, FEATURES, IMAGE, NUMERIC, TEXT
from ray_jobs.data.decoder import RowDecoder
from ray_jobs.data.images import EIGHT_BITS
from ray_jobs.data.manifest import MANIFEST, Manifest, read_manifest
from ray_jobs.data.text_input import TOKENIZER
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import MODEL, SUMMARY


@dataclass(frozen=True)
class TrainedRun:
    """A finished run."""

    folder: Folder
    manifest: Manifest
    threshold: float
    """Decision threshold: the lowest probability of a predicted positive."""
    input_shapes: dict[str, tuple[int, ...]]
    """Shape of a row by model input; names as in `ray_jobs.data.batch`."""
    text: TextReader | None = None
    """Reader of the texts; None if the model takes none."""
    heads: tuple[str, ...] = ()
    """Names of the heads whose logits are blended; empty for the mean of several models."""
    blend: Mapping[str, float] = field(default_factory=dict)
    """Weight of each head in the blend; empty if the heads are not blended."""

    @property
    def takes_images(self) -> bool:
        """Whether the model takes images or image features."""
        return IMAGE in self.input_shapes or FEATURES in self.input_shapes

    @property
    def takes_numbers(self) -> bool:
        """Whether the model takes numbers or categories."""
        return NUMERIC in self.input_shapes or CATEGORY in self.input_shapes

    @property
    def decoder(self) -> RowDecoder:
        """Decoder that turns stored rows into the model's inputs."""
        size = self.input_shapes[IMAGE][-2] if IMAGE in self.input_shapes else None
        # The model takes no weights.
        prepare = self.manifest.prepare.model_copy(update={"weight_column": None})
        manifest = self.manifest.model_copy(update={"prepare": prepare})
        if not self.takes_numbers:
            manifest = manifest.model_copy(update={"numeric_columns": (), "vocabularies": ()})
        if self.text is None:
            manifest = manifest.model_copy(update={"text_columns": ()})
        return RowDecoder(manifest, with_image=self.takes_images, size=size, text=self.text)


def open_run(path: str) -> TrainedRun:
    """Return the finished run in a folder.

    Raises:
        JobError: If the folder has no finished run, or its model is damaged.
    """
    folder = Folder(path)
    for name in (MANIFEST, SUMMARY, MODEL):
        if not folder.exists(name):
            state = "an unfinished run" if folder.exists("run.yaml") else "not a run folder"
            raise JobError(
                f"{folder} is {state}: it has no {name}; choose the folder "
                "<run.storage_path>/<run.name> of a finished `python -m ray_jobs.train`"
            )
    try:
        with (
            folder.filesystem.open_input_file(folder.locate(MODEL)) as file,
            zipfile.ZipFile(file) as archive,
        ):
            config = json.loads(archive.read("config.json"))
        # The models of a `MeanModel` have the same inputs.
        heads = tuple(config["config"].get("heads", ()))
        blends = config["config"].get("blend", False)
        first, *_ = config["config"].get("models", [config])
        network = first["config"]["network"]["config"]
        input_shapes = {
            layer["config"]["name"]: tuple(layer["config"]["batch_shape"][1:])
            for layer in network["layers"]
            if layer["class_name"] == "InputLayer"
        }
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise JobError(
            f"{folder}/{MODEL} is damaged or not a fusion model: {error}; choose another run"
        ) from error
    try:
        summary = folder.read_json(SUMMARY)
        threshold = float(summary["decision_threshold"])
        blend = summary.get("calibration", {}).get("blend", {}) if blends else {}
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{folder}/{SUMMARY} is damaged: {error}; choose another run") from error
    text = None
    if TEXT in input_shapes:
        try:
            text = TextReader.from_json(folder.read_bytes(TOKENIZER).decode())
        except (OSError, ValueError) as error:
            raise JobError(
                f"{folder}/{TOKENIZER} is missing or damaged: {error}; choose another run"
            ) from error
    return TrainedRun(folder, read_manifest(folder), threshold, input_shapes, text, heads, blend)


def require_match(run: TrainedRun, manifest: Manifest, data: Folder) -> None:
    """Check that prepared data has the inputs of the run's model.

    Raises:
        JobError: If the data differs from that of the run; the message lists all differences.
    """
    differences: list[str] = []
    trained = run.manifest
    if run.takes_numbers and manifest.numeric_columns != trained.numeric_columns:
        differences.append(_column_difference(manifest.numeric_columns, trained.numeric_columns))
    images, trained_images = (
        (m.image.names, m.image.width, m.image.height, m.image.features)
        for m in (manifest, trained)
    )
    if run.takes_images and images != trained_images:
        differences.append(f"its images have {_image_text(manifest)}, not {_image_text(trained)}")
    found, known = manifest.image.pixel_range, trained.image.pixel_range
    # 8-bit images are the same in every range.
    if run.takes_images and found and known and found not in (EIGHT_BITS, known):
        differences.append("prepare.pixel_range is {:g},{:g}, not {:g},{:g}".format(*found, *known))
    if run.takes_images and manifest.image.optional and not trained.image.optional:
        differences.append("its rows may lack an image (prepare.missing_image=keep)")
    categories, trained_categories = (
        {vocabulary.column for vocabulary in m.vocabularies} for m in (manifest, trained)
    )
    if run.takes_numbers and (missing := sorted(trained_categories - categories)):
        differences.append(f"the categorical columns {missing} are missing")
    texts = () if run.text is None else run.text.columns
    if lost := [name for name in texts if name not in manifest.text_columns]:
        differences.append(f"the text columns {lost} are missing")
    if manifest.positive_label != trained.positive_label:
        differences.append(
            f"its positive label is {manifest.positive_label!r}, not {trained.positive_label!r}"
        )
    if differences:
        raise JobError(
            f"{data} does not match the run in {run.folder}: {'; '.join(differences)}; prepare it "
            f"with the settings in the run's {MANIFEST}"
        )


def _image_text(manifest: Manifest) -> str:
    image = manifest.image
    names = f" ({', '.join(image.names)})" if image.names else ""
    if image.features:
        return f"{' × '.join(map(str, image.features))} features{names}"
    return f"{image.width} × {image.height} pixels{names}"


def _column_difference(columns: Sequence[str], trained: Sequence[str]) -> str:
    missing = [name for name in trained if name not in columns]
    unknown = [name for name in columns if name not in trained]
    if not missing and not unknown:
        return f"the order of its numeric columns is {list(columns)}, not {list(trained)}"
    parts = [f"{missing} are missing"] if missing else []
    parts += [f"{unknown} are unknown to the run"] if unknown else []
    return f"of its numeric columns, {' and '.join(parts)}"
