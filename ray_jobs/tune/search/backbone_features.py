"""Replaces the images of prepared data with the features of a frozen backbone.

While the backbone of the image branch is frozen, it returns the same features for an image each
time. A search computes them once, and its trials train only the layers above the backbone.

Reads: the training and validation shards of prepared data.
Writes: <run.storage_path>/features/KEY/, itself a prepared folder; manifest.json is written last.
KEY is a hash of everything that determines the features, so existing features are reused.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from mm_model.backbones import IMAGE_BACKBONES, is_location
from mm_model.fusion import TOKEN_FUSIONS
from ray_jobs.cluster.connection import root_cause
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import Split
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    SplitInfo,
    read_manifest,
    require_shards,
)
from ray_jobs.storage.folder import Folder
from ray_jobs.train.job import with_absolute_paths
from ray_jobs.tune.search.feature_extractor import (
    FEATURE_SPLITS,
    SHAPE,
    Extractor,
    ShardKey,
    shard_info,
)

FOLDER = "features"
_FORMAT = 2
"""Increase this whenever the same settings produce different features."""
_READ_THREADS = 8
_SHARD_NAME = re.compile(r"part-(\d{5,})-([0-9a-f]{8})\.parquet")


def compute_features(spec: RunSpec, num_views: int = 1) -> Folder:
    """Return prepared data with features in place of images; requires a connection to Ray.

    Computes only the shards that do not exist yet, in as many actors as the run has replicas.

    Args:
        spec: The spec of the training run; its initial backbone is treated as frozen.
        num_views: Number of views of each image: the unchanged image, then augmented ones.

    Raises:
        JobError: If the data or the weights are unsuitable, there are no images, or an actor fails.
    """
    spec = with_absolute_paths(spec)
    source = Folder(spec.data.prepared)
    manifest = read_manifest(source)
    if spec.model.image.kind == "none":
        raise JobError("model.image.kind=none has no backbone; choose a kind that has one")
    if manifest.image.features:
        raise JobError(
            f"data.prepared={source} contains features already; set it to the data with the images"
        )
    output = features_folder(spec, num_views)
    if output.exists(MANIFEST):
        return output
    require_shards(source, manifest, FEATURE_SPLITS)
    shards = _existing_shards(output, manifest)
    missing: list[ShardKey] = []
    for split in FEATURE_SPLITS:
        indices = range(len(manifest.splits[split].shards))
        missing.extend((split, index) for index in indices if (split, index) not in shards)
    if missing:
        shards |= _compute_shards(spec, missing, num_views, output)
    _features_manifest(manifest, shards, output).write(output)
    return output


def features_folder(spec: RunSpec, num_views: int) -> Folder:
    """Return the folder for the features of a spec, whether or not it exists."""
    manifest = read_manifest(Folder(spec.data.prepared))
    return Folder(spec.run.storage_path) / f"{FOLDER}/{_key(spec, manifest, num_views)}"


def _key(spec: RunSpec, manifest: Manifest, num_views: int) -> str:
    """Return a hash of everything that determines the features."""
    model = spec.model
    # Augmentation layers draw their seeds before the backbone draws its weights.
    random = num_views > 1 or model.image.weights is None
    # These backbones have a fixed activation.
    is_fixed = model.image.kind in IMAGE_BACKBONES
    parts: dict[str, Any] = {
        "format": _FORMAT,
        "kind": model.image.kind,
        "weights": _weights_id(model.image.weights),
        "activation": None if is_fixed else model.activation,
        "augmentation": model.augmentation.model_dump() if random else None,
        "seed": spec.run.seed if random else None,
        "num_views": num_views,
        "tokens": model.fusion.kind in TOKEN_FUSIONS,
        "image": manifest.image.model_dump(),
        "image_size": spec.data.image_size or manifest.image.width,
        "shards": {s: [x.sha256 for x in manifest.splits[s].shards] for s in FEATURE_SPLITS},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _weights_id(weights: str | None) -> str | None:
    """Return the hash of local weights, a file or a folder, or the name of other weights."""
    if weights is None or not is_location(weights):
        return weights
    path, digest = Path(weights).expanduser(), hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest() if files else weights


# -- in the driver --------------------------------------------------------------------------------


def _existing_shards(output: Folder, manifest: Manifest) -> dict[ShardKey, Shard]:
    """Return the complete shards, whose content matches the hash in their name."""

    def read(item: tuple[Split, str]) -> tuple[ShardKey, Shard] | None:
        split, name = item
        if (match := _SHARD_NAME.fullmatch(name.rpartition("/")[2])) is None:
            return None
        key = split, int(match[1])
        shard = shard_info(name, output.read_bytes(name), manifest, key)
        return (key, shard) if shard.sha256.startswith(match[2]) else None

    names = [(split, name) for split in FEATURE_SPLITS for name in output.names(split)]
    with ThreadPoolExecutor(_READ_THREADS) as threads:
        return dict(pair for pair in threads.map(read, names) if pair)


def _compute_shards(
    spec: RunSpec, keys: Sequence[ShardKey], num_views: int, output: Folder
) -> dict[ShardKey, Shard]:
    """Compute shards on the cluster and show the progress on a terminal.

    Raises:
        JobError: If a shard or an actor fails.
    """
    from ray.exceptions import RayError, RayTaskError
    from rich.progress import track

    shards = track(
        _run_actors(spec, keys, num_views, output),
        description="Computing features",
        total=len(keys),
        disable=not sys.stdout.isatty(),
        transient=True,
    )
    try:
        return dict(shards)
    except RayTaskError as error:
        raise JobError(f"cannot compute features: {error.cause}") from error
    except RayError as error:
        raise JobError(
            f"a process that computes features failed: {root_cause(error)}; --run.worker_logs true "
            "prints its log"
        ) from error


def _run_actors(
    spec: RunSpec, keys: Sequence[ShardKey], num_views: int, output: Folder
) -> Iterator[tuple[ShardKey, Shard]]:
    """Yield the shards as they are computed, in any order."""
    import ray
    from ray.util import ActorPool

    train = spec.train
    num_cpus = train.cpus_per_worker / train.replicas_per_worker
    actor: Any = ray.remote(_ExtractorActor).options(
        num_cpus=num_cpus,
        num_gpus=1 if train.use_gpu else 0,
        scheduling_strategy="SPREAD",
        # Recovers from the loss of a node.
        max_restarts=-1,
        max_task_retries=-1,
    )
    num_actors = min(train.workers_range[0] * train.replicas_per_worker, len(keys))
    pool: Any = ActorPool(
        [actor.remote(spec, num_views, output, num_cpus) for _ in range(num_actors)]
    )
    return pool.map_unordered(lambda actor, key: actor.write.remote(key), list(keys))


def _features_manifest(
    manifest: Manifest, shards: dict[ShardKey, Shard], output: Folder
) -> Manifest:
    splits: dict[Split, SplitInfo] = {}
    for split in FEATURE_SPLITS:
        info = manifest.splits[split]
        own = tuple(shards[split, index] for index in range(len(info.shards)))
        splits[split] = info.model_copy(update={"shards": own})
    splits["test"] = SplitInfo(num_rows=0, class_counts=(0, 0), shards=())
    first = splits["train"].shards[0].path
    with output.filesystem.open_input_file(output.locate(first)) as file:
        metadata = pq.read_schema(file).field(manifest.image.columns[0]).metadata
    shape = tuple(map(int, metadata[SHAPE.encode()].decode().split(",")))
    features = {"encoding": "raw", "features": shape}
    image = manifest.image.model_copy(update=features)
    return manifest.model_copy(update={"image": image, "splits": splits})


# -- in an actor ----------------------------------------------------------------------------------


class _ExtractorActor:
    """Runs an `Extractor` in a process of its own."""

    def __init__(self, spec: RunSpec, num_views: int, output: Folder, num_cpus: float) -> None:
        self.arguments, self.num_cpus = (spec, num_views, output), num_cpus
        self.extractor: Extractor | None = None

    def write(self, key: ShardKey) -> tuple[ShardKey, Shard]:
        """Compute and write a shard."""
        # An error here reaches the driver unchanged; one in the constructor would kill the actor.
        if self.extractor is None:
            os.environ["KERAS_BACKEND"] = "tensorflow"
            from ray_jobs.cluster.strategy import set_devices

            set_devices(self.num_cpus, self.arguments[0].train.use_gpu)
            self.extractor = Extractor(*self.arguments, threads=max(math.ceil(self.num_cpus), 1))
        return key, self.extractor.write(*key)
