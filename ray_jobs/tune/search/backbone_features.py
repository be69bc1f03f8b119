"""A frozen backbone and prepared images → prepared data with its features in their place.

While the backbone of the image branch is frozen it gives the same features of an image each time. A
search computes them once; its trials train what is above them: heads, numeric branch, fusion.

Reads: the training and validation shards of prepared data.
Writes: <run.storage_path>/features/KEY/, a prepared folder of its own, manifest.json last. The key
is a hash of all that the features follow from, so that what is there need not be computed again.

    a shard ─ Extractor (actors: one backbone each): decode, look at each view ─→ its features

Rows, row groups and shards stay as they are. View 0 is of the image as it is; the others are of
augmented images, for training rows alone: others have the first view in their place. What an
augmented view shows follows from seed, shard, batch and view, not from the actor that made it.
Features are computed in float32, whatever a trial computes in.

    B rows of a batch   N images a row   H × W pixels   V views   F features
"""

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_model.branches import has_imagenet_weights
from ray_jobs.cluster.connection import reason
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec, Split
from ray_jobs.data.batch import IMAGE
from ray_jobs.data.manifest import NAME as MANIFEST
from ray_jobs.data.manifest import Manifest, Shard, SplitInfo, read_manifest, require_shards
from ray_jobs.data.prefetch import prefetch_map
from ray_jobs.data.reader import RowDecoder, ShardReader, StoredRows, bytes_column
from ray_jobs.prepare.shard_writer import parquet_options
from ray_jobs.storage.folder import Folder
from ray_jobs.train.job import with_absolute_paths

FOLDER = "features"

Place = tuple[Split, int]
"""Split and index of a shard."""

_SPLITS: tuple[Split, ...] = ("train", "validation")
_FORMAT = 1
"""Goes up when the same settings give other features."""
_IMAGES_AT_ONCE = 32
_READ_THREADS = 8
_PART = re.compile(r"part-(\d{5,})-([0-9a-f]{8})\.parquet")


def features_folder(spec: RunSpec, num_views: int) -> Folder:
    """Return where the features that a specification describes are, or would be."""
    manifest = read_manifest(Folder(spec.data.prepared))
    return Folder(spec.run.storage_path) / f"{FOLDER}/{_key(spec, manifest, num_views)}"


def features_of(spec: RunSpec, num_views: int = 1, num_workers: int | None = None) -> Folder:
    """Return prepared data with features in place of images; needs a connection to Ray.

    What is there already, as a whole or shard by shard, is not computed again.

    Args:
        spec: of the training; its backbone is taken as frozen, as it starts.
        num_views: of each image: 1 for the image as it is, or one more than there are augmented
            ones.
        num_workers: processes with a backbone each; by default as many as the training has
            replicas, on as many CPUs and GPUs.

    Raises:
        JobError: if prepared data, weights or a process fail, or there are no images.
        ValueError: if there is no view.
    """
    if num_views < 1:
        raise ValueError(f"num_views={num_views}: the first view is of the image as it is")
    spec = with_absolute_paths(spec)
    source = Folder(spec.data.prepared)
    manifest = read_manifest(source)
    if spec.model.image.kind == "none":
        raise JobError("model.image.kind=none has no backbone that gives features; choose another")
    if manifest.image.features:
        raise JobError(f"{source} holds features already; give the data that has the images")
    output = features_folder(spec, num_views)
    if output.exists(MANIFEST):
        return output
    require_shards(source, manifest, _SPLITS)
    places: list[Place] = [(s, i) for s in _SPLITS for i in range(len(manifest.splits[s].shards))]
    shards = _finished(output, manifest)
    todo = [place for place in places if place not in shards]
    shards |= _computed(spec, todo, num_views, output, num_workers)
    _manifest_of(manifest, shards, num_views, output).write(output)
    return output


# -- what they follow from ------------------------------------------------------------------------


def has_activation_of_ours(kind: str) -> bool:
    """Whether an image branch has `model.activation`, and not that of its own weights."""
    return kind not in has_imagenet_weights()


def _key(spec: RunSpec, manifest: Manifest, num_views: int) -> str:
    """Return a hash of everything that features follow from."""
    model = spec.model
    # Layers that augment draw their seeds before the backbone draws its weights.
    random = num_views > 1 or model.image.weights is None
    parts: dict[str, Any] = {
        "format": _FORMAT,
        "kind": model.image.kind,
        "weights": _weights(model.image.weights),
        "activation": model.activation if has_activation_of_ours(model.image.kind) else None,
        "augmentation": model.augmentation.model_dump() if random else None,
        "seed": spec.run.seed if random else None,
        "num_views": num_views,
        "image": manifest.image.model_dump(),
        "image_size": spec.data.image_size or manifest.image.width,
        "shards": {s: [x.sha256 for x in manifest.splits[s].shards] for s in _SPLITS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _weights(weights: str | None) -> str | None:
    """Return what tells weights from others: of a local file the hash of its content."""
    if weights and weights != "imagenet" and (file := Path(weights).expanduser()).is_file():
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    return weights


# -- in the driver --------------------------------------------------------------------------------


def _finished(output: Folder, manifest: Manifest) -> dict[Place, Shard]:
    """Return the shards that are there whole: their names hold a piece of their own hash."""
    found = [
        (split, name, match)
        for split in _SPLITS
        for name in output.names(split)
        if (match := _PART.fullmatch(name.rpartition("/")[2]))
    ]

    def read(item: tuple[Split, str, re.Match[str]]) -> tuple[Place, Shard] | None:
        split, name, match = item
        shard = _shard(name, output.read_bytes(name), manifest.splits[split], int(match[1]))
        return ((split, int(match[1])), shard) if shard.sha256[:8] == match[2] else None

    with ThreadPoolExecutor(_READ_THREADS) as threads:
        return dict(pair for pair in threads.map(read, found) if pair)


def _shard(path: str, content: Any, of: SplitInfo, index: int) -> Shard:
    source = of.shards[index]
    return Shard(
        path=path,
        num_rows=source.num_rows,
        row_groups=source.row_groups,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        rows_sha256=source.sha256,
    )


def _computed(
    spec: RunSpec, todo: Sequence[Place], num_views: int, output: Folder, num_workers: int | None
) -> dict[Place, Shard]:
    """Compute shards on the cluster; return what is to be known of them.

    Raises:
        JobError: if one of them, or a process, fails.
    """
    from ray.exceptions import RayError
    from rich.progress import track

    if not todo:
        return {}
    train, shards = spec.train, {}
    replicas = train.replicas_per_worker
    num_cpus = train.cpus_per_worker / replicas
    tasks = _on_actors(
        (spec, num_views, output, num_cpus),
        todo,
        min(num_workers or train.workers_range[0] * replicas, len(todo)),
        {"num_cpus": num_cpus, "num_gpus": 1 if train.use_gpu else 0},
    )
    try:
        for row in track(
            tasks,
            description="Computing features",
            total=len(todo),
            disable=not sys.stdout.isatty(),
            transient=True,
        ):
            if row["failure"]:
                raise JobError(f"features cannot be computed: {row['failure']}")
            shards[row["split"], row["index"]] = Shard.model_validate_json(row["shard"])
    except RayError as error:
        raise JobError(
            f"a process of the job failed: {reason(error)}; --run.worker_logs true shows its log"
        ) from error
    return shards


def _on_actors(
    arguments: tuple[Any, ...], todo: Sequence[Place], num_actors: int, resources: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield what `_Actor` answers of each shard, in whatever order."""
    import ray.data

    tasks = [pa.table({"split": [split], "index": [index]}) for split, index in todo]
    dataset = ray.data.from_arrow(tasks).map_batches(
        _Actor,  # type: ignore[arg-type]
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        # A shard a call, so that one that is done is written.
        batch_size=None,
        batch_format="pyarrow",
        **resources,
    )
    dataset.context.enable_progress_bars = False
    tables: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    for table in tables:
        yield from table.to_pylist()


def _manifest_of(
    manifest: Manifest, shards: dict[Place, Shard], num_views: int, output: Folder
) -> Manifest:
    splits = {
        split: info.model_copy(
            update={"shards": tuple(shards[split, i] for i in range(len(info.shards)))}
        )
        for split, info in manifest.splits.items()
        if split in _SPLITS
    }
    first = splits["train"].shards[0].path
    with output.filesystem.open_input_file(output.locate(first)) as file:
        cells = pq.read_schema(file).field(manifest.image.columns[0]).type
    width = cells.byte_width // (num_views * np.dtype(np.float32).itemsize)
    image = {"encoding": "raw", "features": (num_views, width)}
    nothing = SplitInfo(num_rows=0, class_counts=(0, 0), shards=())
    return manifest.model_copy(
        update={
            "image": manifest.image.model_copy(update=image),
            "splits": {**splits, "test": nothing},
        }
    )


# -- in an actor ----------------------------------------------------------------------------------


class _Actor:
    """Computes shards in a process of its own, and answers with a row for each of them.

    What ends the job is in the row, since an exception in a Ray Data task comes with a traceback.
    """

    def __init__(self, spec: RunSpec, num_views: int, output: Folder, num_cpus: float) -> None:
        os.environ["KERAS_BACKEND"] = "tensorflow"
        from ray_jobs.cluster.strategy import set_devices

        set_devices(num_cpus, spec.train.use_gpu)
        self.failure = None
        try:
            self.extractor = Extractor(spec, num_views, output, max(math.ceil(num_cpus), 1))
        except (OSError, ValueError, JobError) as error:
            self.failure = str(error)

    def __call__(self, tasks: pa.Table) -> pa.Table:
        """Compute the shards of a table of places."""
        rows = [{**task, **self._answer(task)} for task in tasks.to_pylist()]
        text = dict.fromkeys(("split", "shard", "failure"), pa.string())
        return pa.Table.from_pylist(rows, pa.schema({**text, "index": pa.int64()}))

    def _answer(self, task: dict[str, Any]) -> dict[str, str]:
        if self.failure:
            return {"failure": self.failure}
        try:
            return {"shard": self.extractor.write(**task).model_dump_json()}
        except (OSError, ValueError, pa.ArrowException) as error:
            return {"failure": str(error)}


class Extractor:
    """Holds the frozen backbone of a specification, and turns shards into shards of features.

    Args:
        spec: of the training, whose backbone has the same weights to start from.
        num_views: of each training image.
        output: prepared folder to write into.
        threads: that decode.
    """

    def __init__(self, spec: RunSpec, num_views: int, output: Folder, threads: int = 1) -> None:
        import keras
        import tensorflow as tf

        from mm_model.model import backbone_model
        from ray_jobs.train.checkpoints.checkpoint import is_random_state
        from ray_jobs.train.model_factory import new_model

        self.num_views, self.output, self.threads = num_views, output, threads
        self.seed = spec.run.seed
        self.source = Folder(spec.data.prepared)
        self.manifest = read_manifest(self.source)
        self.decoder = RowDecoder(self.manifest, with_image=True, size=spec.data.image_size)
        self.num_images = len(self.decoder.image_columns)
        self.batch_rows = max(_IMAGES_AT_ONCE // self.num_images, 1)
        keras.utils.set_random_seed(self.seed)
        # Frozen by this, a batch norm keeps its statistics also where a view is augmented.
        frozen = spec.overlay({"model.image.trainable": False})
        backbone: Any = backbone_model(new_model(frozen, self.manifest))
        random = [v for v in backbone.variables if is_random_state(v)]
        self.num_states = len(random)

        def view(images_BHWC: Any, states: Any) -> Any:
            for i, variable in enumerate(random):
                variable.assign(tf.cast(states[i], variable.dtype))
            return backbone(tf.cast(images_BHWC, tf.float32), training=True)

        # One shape, for which they are traced once.
        shape = (self.batch_rows * self.num_images, *self.decoder.pixel_shape)
        pixels: Any = tf.TensorSpec(shape, tf.uint8)  # type: ignore[call-arg]
        states: Any = tf.TensorSpec((self.num_states, 2), tf.int64)  # type: ignore[call-arg]
        self._view = tf.function(view, input_signature=[pixels, states])
        self._plain = tf.function(
            lambda images: backbone(tf.cast(images, tf.float32), training=False),
            input_signature=[pixels],
        )

    def write(self, split: Split, index: int) -> Shard:
        """Compute the features of one shard and write them in place of its images.

        Raises:
            ValueError: if a stored image is damaged.
            OSError: if the shard cannot be read, or its features not be written.
        """
        info = self.manifest.splits[split]
        source = info.shards[index]
        reader = ShardReader(self.source, [source], self.decoder.columns)
        tables = reader.read_groups(0, range(len(source.row_groups)))
        features_RNVF = self.features(tables, split, index)
        schema, start = tables[0].schema, 0
        for name in self.decoder.image_columns:
            at, nullable = schema.get_field_index(name), schema.field(name).nullable
            kind = pa.binary(features_RNVF[0, 0].nbytes)
            schema = schema.set(at, pa.field(name, kind, nullable))
        stream = pa.BufferOutputStream()
        options = parquet_options(schema, self.manifest.image)
        with pq.ParquetWriter(stream, schema, **options) as writer:
            for table in tables:
                rows = slice(start, start + table.num_rows)
                stored = self._with_features(table, features_RNVF[rows])
                writer.write_table(stored.cast(schema), row_group_size=table.num_rows)
                start = rows.stop
        content = stream.getvalue()
        sha256 = hashlib.sha256(content).hexdigest()
        path = f"{split}/part-{index:05d}-{sha256[:8]}.parquet"
        self.output.write_bytes(path, content)
        return _shard(path, content, info, index)

    def features(self, tables: Sequence[pa.Table], split: Split, index: int) -> np.ndarray:
        """Return the features (rows, N, V, F) of the images of a shard."""
        import cv2

        # One thread an image; more of them would only wait for each other.
        cv2.setNumThreads(1)
        stored = StoredRows(tables)

        def decoded(start: int) -> np.ndarray:
            # The last batch is filled with its last row.
            rows = np.minimum(np.arange(start, start + self.batch_rows), stored.num_rows - 1)
            batch = self.decoder.batch(stored, rows)
            self.decoder.fill(batch, stored, rows)
            return batch[IMAGE].reshape(-1, *self.decoder.pixel_shape)

        starts = range(0, stored.num_rows, self.batch_rows)
        with ThreadPoolExecutor(self.threads, "features-decode") as threads:
            batches = prefetch_map(decoded, starts, threads, self.threads + 1)
            found = [
                self._views(images, (_SPLITS.index(split), index, batch))
                for batch, images in enumerate(batches)
            ]
        return np.concatenate(found)[: stored.num_rows]

    def _views(self, images_BHWC: np.ndarray, place: tuple[int, ...]) -> np.ndarray:
        """Return all views (B, N, V, F) of the images of some rows.

        Args:
            images_BHWC: N of each row.
            place: index of the split, the shard and the batch.
        """
        views = [self._plain(images_BHWC).numpy()]  # type: ignore[union-attr]
        for number in range(1, self.num_views):
            if _SPLITS[place[0]] != "train":
                views.append(views[0])
                continue
            drawn = np.random.SeedSequence((self.seed, *place, number))
            states = drawn.generate_state(2 * self.num_states).reshape(-1, 2).astype(np.int64)
            views.append(self._view(images_BHWC, states).numpy())  # type: ignore[union-attr]
        views_BVF = np.stack(views, axis=1).astype(np.float32)
        return views_BVF.reshape(-1, self.num_images, *views_BVF.shape[1:])

    def _with_features(self, table: pa.Table, features_RNVF: np.ndarray) -> pa.Table:
        for n, name in enumerate(self.decoder.image_columns):
            missing = table.column(name).is_null()
            cells = bytes_column(features_RNVF[:, n], missing)
            table = table.set_column(table.column_names.index(name), name, cells)
        return table
