"""Computes the features of images with a frozen backbone, one shard at a time.

Rows, row groups and shards stay the same. View 0 shows the image unchanged; further views show
augmented images, for training rows only. In the other splits they repeat view 0. An augmentation
depends on seed, shard, batch and view, but not on the process that computes it. Features are
float32, whatever the precision of a trial.

    B rows of a batch   R rows of a shard   N images per row   H × W pixels   V views   F features
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_model.fusion import TOKEN_FUSIONS
from ray_jobs.config.prepare_spec import Split
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.batch import IMAGE
from ray_jobs.data.decoder import RowDecoder, bytes_column
from ray_jobs.data.manifest import Manifest, Shard, read_manifest
from ray_jobs.data.prefetch import prefetch_map
from ray_jobs.data.reader import ShardReader, StoredRows
from ray_jobs.prepare.shards.shard_writer import parquet_options
from ray_jobs.storage.folder import Folder

ShardKey = tuple[Split, int]
"""Split and index of a shard."""

FEATURE_SPLITS: tuple[Split, ...] = ("train", "validation")
SHAPE = "shape"
"""Metadata of the columns of features: V, F, or with tokens V, 1 + T, F."""
_IMAGES_PER_BATCH = 32


class Extractor:
    """Holds the frozen backbone of a spec and computes shards of features.

    Args:
        spec: The spec of the training run, which determines the backbone's initial weights.
        num_views: Number of views of each image.
        output: The prepared folder to write.
        threads: Number of threads that decode images.
    """

    def __init__(self, spec: RunSpec, num_views: int, output: Folder, threads: int = 1) -> None:
        import keras
        import tensorflow as tf

        from mm_model.model import backbone_model
        from mm_model.per_row_random import random_states
        from ray_jobs.train.model_factory import new_model

        self.num_views, self.output, self.threads = num_views, output, threads
        self.seed = spec.run.seed
        self.source = Folder(spec.data.prepared)
        self.manifest = read_manifest(self.source)
        self.decoder = RowDecoder(self.manifest, with_image=True, size=spec.data.image_size)
        self.num_images = len(self.decoder.image_columns)
        self.batch_rows = max(_IMAGES_PER_BATCH // self.num_images, 1)
        keras.utils.set_random_seed(self.seed)
        # Batch norm that is not trainable keeps its statistics even with `training=True`.
        frozen = spec.overlay({"model.image.trainable": False, "model.text.kind": "none"})
        with_tokens = spec.model.fusion.kind in TOKEN_FUSIONS
        backbone: Any = backbone_model(new_model(frozen, self.manifest), with_tokens)
        random = random_states(backbone)
        self.num_states = len(random)

        def augmented(images_BHWC: Any, states: Any) -> Any:
            for i, variable in enumerate(random):
                variable.assign(tf.cast(states[i], variable.dtype))
            return backbone(tf.cast(images_BHWC, tf.float32), training=True)

        # With a single shape, each function is traced once.
        shape = (self.batch_rows * self.num_images, *self.decoder.pixel_shape)
        pixels: Any = tf.TensorSpec(shape, tf.uint8)  # type: ignore[call-arg]
        states: Any = tf.TensorSpec((self.num_states, 2), tf.int64)  # type: ignore[call-arg]
        self._augmented: Any = tf.function(
            augmented, input_signature=[pixels, states], autograph=False
        )
        self._plain: Any = tf.function(
            lambda images: backbone(tf.cast(images, tf.float32), training=False),
            input_signature=[pixels],
            autograph=False,
        )

    def write(self, split: Split, index: int) -> Shard:
        """Write a shard with features in place of its images.

        Raises:
            ValueError: If a stored image is damaged.
            OSError: If the shard cannot be read, or its features cannot be written.
        """
        source = self.manifest.splits[split].shards[index]
        columns = [*self.decoder.columns, *self.manifest.text_columns]
        reader = ShardReader(self.source, [source], columns)
        tables = reader.read_groups(0, range(len(source.row_groups)))
        features_RNVF = self._features(tables, split, index)
        table = pa.concat_tables(tables)
        for n, name in enumerate(self.decoder.image_columns):
            at = table.schema.get_field_index(name)
            cells = bytes_column(features_RNVF[:, n], table[name].is_null())
            nullable = table.schema.field(name).nullable
            shape = ",".join(map(str, features_RNVF.shape[2:]))
            field = pa.field(name, cells.type, nullable, metadata={SHAPE: shape})
            table = table.set_column(at, field, cells)
        stream, start = pa.BufferOutputStream(), 0
        options = parquet_options(table.schema, self.manifest.image)
        with pq.ParquetWriter(stream, table.schema, **options) as writer:
            for num_rows in source.row_groups:
                writer.write_table(table.slice(start, num_rows), row_group_size=num_rows)
                start += num_rows
        content = stream.getvalue()
        sha256 = hashlib.sha256(content).hexdigest()
        path = f"{split}/part-{index:05d}-{sha256[:8]}.parquet"
        self.output.write_bytes(path, content)
        return shard_info(path, content, self.manifest, (split, index))

    def _features(self, tables: Sequence[pa.Table], split: Split, index: int) -> np.ndarray:
        """Return the features (R, N, V, F) of the images of a shard."""
        import cv2

        # Images are decoded in parallel, so OpenCV threads would only compete for the CPUs.
        cv2.setNumThreads(1)
        stored = StoredRows(tables)

        def decode(start: int) -> np.ndarray:
            # Repeat the last row to fill the last batch.
            rows = np.minimum(np.arange(start, start + self.batch_rows), stored.num_rows - 1)
            batch = self.decoder.make_batch(stored, rows)
            self.decoder.fill_images(batch, stored, rows)
            return batch[IMAGE].reshape(-1, *self.decoder.pixel_shape)

        starts = range(0, stored.num_rows, self.batch_rows)
        with ThreadPoolExecutor(self.threads, "features-decode") as threads:
            batches = prefetch_map(decode, starts, threads, self.threads + 1)
            features = [
                self._views(images_BHWC, (FEATURE_SPLITS.index(split), index, batch))
                for batch, images_BHWC in enumerate(batches)
            ]
        return np.concatenate(features)[: stored.num_rows]

    def _views(self, images_BHWC: np.ndarray, place: tuple[int, int, int]) -> np.ndarray:
        """Return all views (B, N, V, F) of the images of a batch; `place`: split, shard, batch."""
        views = [self._plain(images_BHWC).numpy()]
        for view in range(1, self.num_views):
            if FEATURE_SPLITS[place[0]] != "train":
                views.append(views[0])
                continue
            seeds = np.random.SeedSequence((self.seed, *place, view))
            states = seeds.generate_state(2 * self.num_states).reshape(-1, 2).astype(np.int64)
            views.append(self._augmented(images_BHWC, states).numpy())
        views_BVF = np.stack(views, axis=1).astype(np.float32)
        return views_BVF.reshape(-1, self.num_images, *views_BVF.shape[1:])


def shard_info(path: str, content: Any, manifest: Manifest, key: ShardKey) -> Shard:
    """Return the manifest entry of a shard of features."""
    split, index = key
    source = manifest.splits[split].shards[index]
    return Shard(
        path=path,
        num_rows=source.num_rows,
        row_groups=source.row_groups,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        rows_sha256=source.sha256,
    )
