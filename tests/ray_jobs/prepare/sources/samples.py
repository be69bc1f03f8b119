"""Images and tables of a few rows, in every format."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.data.images import BadImage
from ray_jobs.prepare.sources.source import Source
from tests.ray_jobs import tiny


def spec(**options: object) -> PrepareSpec:
    return PrepareSpec.model_validate(options)


def column(*cells: object, kind: pa.DataType | None = None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(cells, kind)])


def jpeg(seed: int, size: int = 8) -> bytes:
    """Return a JPEG that differs for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return tiny.jpeg(pixels)


def touch(folder: Path, *names: str) -> Path:
    """Create empty files in a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def write_tar(path: Path, files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def example(**features: Any) -> bytes:
    """Return a record of a TFRecord file."""
    import tensorflow as tf

    named = {}
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], bytes):
            named[name] = tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
        elif isinstance(values[0], float):
            named[name] = tf.train.Feature(float_list=tf.train.FloatList(value=values))
        else:
            named[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=values))
    return tf.train.Example(features=tf.train.Features(feature=named)).SerializeToString()


def write_tfrecord(path: Path, records: list[bytes], compression: str = "") -> None:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for record in records:
            writer.write(record)


def write_csv(path: Path, columns: dict[str, list]) -> str:
    lines = [
        ",".join(columns),
        *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True)),
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def read_all(source: Source, image: str = "", rows: list[int] | None = None) -> list:
    """Return the images of a source in the order of its table, or the reason of a bad image."""
    refs = source.images[image]
    assert len(refs) == source.table.num_rows
    refs = refs if rows is None else refs.take(rows)
    images = source.readers[image].read(refs)
    return [image.reason if isinstance(image, BadImage) else image for image in images]
