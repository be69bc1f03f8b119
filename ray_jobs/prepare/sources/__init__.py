"""Readers of the input formats: each turns a `PrepareSpec` into a `Source`.

Modules: `detect_source` opens the source; `loose_files`, `huggingface_imagefolder`,
`parquet_files`, `webdataset` and `tfrecord` (with `tfrecord_format`) each read one format;
`source_files`, `find_key`, `image_resolver`, `key_join` and `byte_range_reader` implement the steps
that they share: list files, find the key column, find the file of each path, join by key, read
images. `source` defines `Source` and `ImageRefs`.
"""

from ray_jobs.prepare.sources.detect_source import open_source

__all__ = ["open_source"]
