"""Compares the answers of a SavedModel to image files with those of `predict`."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ray_jobs.config.errors import JobError
from ray_jobs.data.batch import TEXT, TEXT_MASK
from ray_jobs.data.images import BadImage
from ray_jobs.export.runners import Runner
from ray_jobs.predict.row_sources import raw_row_rules
from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.prepare.row_validation import Rows, read_rows
from ray_jobs.prepare.shards.shard_writer import RowConverter
from ray_jobs.prepare.sources import open_source

_MAX_ROWS = 200
_BATCH = 20
_FORMATS = ("JPEG", "PNG")
_ORIENTATION = 274
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class PhotoRows:
    """Rows of the user's table, whose image files the SavedModel can read."""

    rows: Rows
    contents: Sequence[Sequence[bytes]]
    """Image files of each row; empty for missing ones."""
    converter: RowConverter

    @classmethod
    def of(cls, run: TrainedRun) -> "PhotoRows | str":
        """Return up to 200 rows of the table that was prepared, or why there are none.

        Leaves out rows with image files other than upright JPEG and PNG with 8 bits.
        """
        manifest, rules = run.decoder.manifest, raw_row_rules(run)
        words = (*(v.column for v in manifest.vocabularies), *manifest.text_columns)
        categorical = tuple(v.column for v in manifest.vocabularies)
        try:
            source = open_source(rules, categorical, manifest.text_columns, labelled=False)
            rows = read_rows(source, rules, manifest.numeric_columns, None, words)
        except (JobError, OSError) as error:
            return f"the photos cannot be read: {error}"
        good = np.random.default_rng(0).permutation(np.flatnonzero(rows.good))
        rows = rows.take(np.sort(good[:_MAX_ROWS]))
        readers = tuple(source.readers[name] for name in rules.image_columns or ("",))
        columns = []
        for refs, reader in zip(rows.images, readers, strict=True):
            files = reader.read(refs.take(np.flatnonzero(refs.has_image)))
            columns.append([next(files) if present else b"" for present in refs.has_image])
        contents = list(zip(*columns, strict=True))
        usable = [row for row, files in enumerate(contents) if all(map(_is_plain, files))]
        if not usable:
            return "no row has only upright JPEG or PNG files with 8 bits"
        converter = RowConverter(
            readers, manifest.numeric_columns, words, rules,
            pixel_range=run.manifest.image.pixel_range,
        )  # fmt: skip
        return cls(rows.take(np.array(usable)), [contents[row] for row in usable], converter)


def largest_difference(run: TrainedRun, photos: PhotoRows, model: Runner, raw: Runner) -> float:
    """Return the largest difference in probability between image files and the path of `predict`.

    Args:
        run: The run.
        photos: The rows.
        model: Calls the model of the run.
        raw: Calls the signature that takes image files.
    """
    differences: list[float] = []
    for start in range(0, len(photos.contents), _BATCH):
        part = range(start, min(start + _BATCH, len(photos.contents)))
        rows = photos.rows.take(np.array(part))
        stored = list(photos.converter.convert_images(rows))
        good = [i for i, images in enumerate(stored) if not isinstance(images, BadImage)]
        rows = rows.take(np.array(good, np.int64))
        images: Any = [stored[i] for i in good]
        batch = run.decoder.decode(photos.converter.table(rows, images))
        expected = model({name: batch[name] for name in run.input_shapes})
        found = raw(_raw_inputs(run, rows, [photos.contents[part[i]] for i in good], batch))
        differences += np.abs(found - expected).tolist()
    return max(differences, default=0.0)


def _raw_inputs(
    run: TrainedRun, rows: Rows, contents: Sequence[Sequence[bytes]], batch: dict[str, np.ndarray]
) -> dict[str, Any]:
    files = np.array([list(files) for files in contents], object)
    inputs = {"image": files if run.decoder.multi_image else files[:, 0]}
    manifest = run.decoder.manifest
    if manifest.numeric_columns:
        inputs["numeric"] = rows.numeric_RF.astype(np.float32)
    if manifest.vocabularies:
        columns = [rows.categories[v.column].fill_null("") for v in manifest.vocabularies]
        inputs["words"] = np.array([column.to_pylist() for column in columns], object).T
    return inputs | {name: batch[name] for name in (TEXT, TEXT_MASK) if name in batch}


def _is_plain(content: bytes | BadImage) -> bool:
    """Whether an image file is missing, or an upright JPEG or PNG with 8 bits."""
    if isinstance(content, BadImage):
        return False
    if not content:
        return True
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            is_upright = image.getexif().get(_ORIENTATION, 1) == 1
            # Pillow opens colours of 16 bits as 8 bits.
            is_8_bit = content[:8] != _PNG or content[24] <= 8
            return is_upright and is_8_bit and image.mode in ("RGB", "L", "RGBA", "P", "1", "LA")
    except (OSError, Image.DecompressionBombError):
        return False
