"""Reads TFRecord files of `tf.train.Example`.

Input: files whose records contain an encoded image in one feature and, unless `prepare.table` is
set, the numbers in other features. Output: the position of each image in its file. The bytes
of the images are not read here.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.text import names_text
from ray_jobs.prepare.cell_text import column_text
from ray_jobs.prepare.sources.byte_range_reader import ByteRangeReader
from ray_jobs.prepare.sources.find_key import add_key, describe_found
from ray_jobs.prepare.sources.key_join import ImageIndex, join_images, read_keyed_table
from ray_jobs.prepare.sources.source import ImageRefs, Source, repeat_paths
from ray_jobs.prepare.sources.source_files import find_files, map_in_threads
from ray_jobs.prepare.sources.tfrecord_format import (
    BYTES_LIST,
    DamagedFile,
    Field,
    Window,
    read_features,
    read_frames,
    read_scalar,
)
from ray_jobs.prepare.table import require_column
from ray_jobs.prepare.table_files.record_table import RecordTable, stack
from ray_jobs.storage.folder import Folder

DEFAULT_FEATURES = ("image/encoded", "image")
_WINDOW_BYTES = {True: 16 << 10, False: 4 << 20}
"""Minimum bytes per read, keyed by whether the files are local. A read may include part of an
image; the rest of the image is skipped."""


def open_source(spec: PrepareSpec, may_find: bool = True) -> Source:
    """Return the records of the TFRecord files in `prepare.images`.

    The image is in the feature that `prepare.image_column` names, by default `image/encoded` or
    `image`; several images per record are in the features that `prepare.image_columns` names. The
    table consists of the features with a single number or string per record; one of them may be
    found as the key, if `may_find`. With `prepare.table`, only the key is read from the records,
    and records and table are joined by key.
    """
    folder, names, notes = find_files(spec.images, is_tfrecord, "TFRecord files")
    # The features that may hold each image, in order of preference.
    features: dict[str, tuple[str, ...]] = {name: (name,) for name in spec.image_columns}
    features = features or {"": (spec.image_column,) if spec.image_column else DEFAULT_FEATURES}
    files = map_in_threads(partial(_read_file, folder, features, spec), names)
    left_out = {feature for file in files for feature in file.left_out}
    own = stack(file.records for file in files)
    own = own.drop_columns([name for name in own.column_names if name in left_out])
    refs: dict[str, ImageRefs] = {}
    for image, candidates in features.items():
        paths = repeat_paths(names, [len(file.spans[image]) for file in files])
        spans = np.concatenate([file.spans[image] for file in files])
        has_image = spans[:, 1] >= 0
        if not has_image.any():
            seen = sorted({name for file in files for name in file.features})
            raise JobError(
                f"no record of prepare.images={spec.images!r} has an image in the feature "
                f"{' or '.join(map(repr, candidates))} (the records have: {names_text(seen)}); set "
                "prepare.image_column to the feature that contains the image"
                f"{did_you_mean(candidates[0], seen)}"
            )
        where = pa.array(np.arange(len(paths)), mask=~has_image)
        refs[image] = ImageRefs(paths.take(where), spans[:, 0], spans[:, 1])
    readers = dict.fromkeys(features, ByteRangeReader(folder))
    if not spec.table:
        own, found = add_key(own, spec, next(iter(refs.values())), may_find)
        notes = (*notes, *describe_found(found))
        return Source(own, refs, readers, settings=found, notes=notes)
    owner = f"the TFRecord data in {spec.images}"
    require_column(own.column_names, spec.key_column, "prepare.key_column", owner)
    keys = column_text(own.column(spec.key_column))
    indexes: dict[str, ImageIndex] = {}
    for image, of_image in refs.items():
        rows = np.flatnonzero(of_image.has_image)
        indexes[image] = ImageIndex(keys.take(pa.array(rows)), of_image.take(rows))
    table, table_notes, _ = read_keyed_table(spec)
    images, unmatched = join_images(table, spec, indexes)
    return Source(table, images, readers, unmatched, notes=(*table_notes, *notes))


def is_tfrecord(name: str) -> bool:
    """Return whether a name is that of a TFRecord file, such as `a.tfrecord-00000-of-00010`."""
    base = name.lower().rpartition("/")[2]
    return ".tfrecord" in base or base.startswith("tfrecord") or base.endswith((".tfrec", ".tfr"))


@dataclass
class _FileIndex:
    records: pa.Table
    spans: dict[str, np.ndarray]
    """Start and size of the images: int64 (number of records, 2); size -1 for a missing image."""
    features: set[str]
    left_out: set[str]
    """Features that cannot be columns, because in some record they have several values, or a string
    that is too long or not UTF-8."""


def _read_file(
    folder: Folder, features: dict[str, tuple[str, ...]], spec: PrepareSpec, name: str
) -> _FileIndex:
    """Return the table of a file's records and the positions of their images."""
    records = RecordTable()
    left_out: set[str] = set()
    positions: dict[str, list[tuple[int, int]]] = {image: [] for image in features}
    image_features = {feature for candidates in features.values() for feature in candidates}
    seen: set[str] = set()
    try:
        with folder.filesystem.open_input_file(folder.locate(name)) as file:
            window = Window(file, _WINDOW_BYTES[folder.is_local])
            for first, end in read_frames(window):
                record: dict[str, str | int | float | None] = {}
                images: dict[str, tuple[int, int]] = {}
                for feature, value in read_features(window, first, end):
                    seen.add(feature)
                    if feature in image_features:
                        if position := _image_position(window, feature, value):
                            images[feature] = position
                    elif feature not in left_out and (not spec.table or feature == spec.key_column):
                        try:
                            record[feature] = read_scalar(window, value) if value else None
                        except ValueError:
                            left_out.add(feature)
                records.append(record)
                for image, candidates in features.items():
                    position = next((images[c] for c in candidates if c in images), (0, -1))
                    positions[image].append(position)
    except DamagedFile as error:
        raise JobError(
            f"{folder}/{name} is damaged, compressed or not a TFRecord file of tf.train.Example: "
            f"{error}; recreate the file without compression"
        ) from error
    except OSError as error:
        raise JobError(f"{folder}/{name} cannot be read: {error}") from error
    spans = {i: np.array(of_image, np.int64).reshape(-1, 2) for i, of_image in positions.items()}
    return _FileIndex(records.to_table(), spans, seen, left_out)


def _image_position(window: Window, feature: str, value: Field | None) -> tuple[int, int] | None:
    """Return the start and size of an image feature's bytes, or None if the feature is empty."""
    if value is None:
        return None
    if value.number != BYTES_LIST:
        raise JobError(
            f"the feature {feature!r} holds numbers, not the bytes of an image file; set "
            "prepare.image_column (or prepare.image_columns) to the feature that contains the image"
        )
    parts = [field for field in window.fields(value.start, value.end) if field.number == 1]
    if len(parts) > 1:
        raise JobError(
            f"the feature {feature!r} holds {len(parts)} images in one record; store one image per "
            "feature and name the features in prepare.image_columns"
        )
    if not parts or parts[0].start == parts[0].end:
        return None
    return parts[0].start, parts[0].end - parts[0].start
