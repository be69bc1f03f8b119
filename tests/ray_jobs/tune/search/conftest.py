"""Prepared images and the features that a frozen backbone computes from them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Shard
from ray_jobs.storage.folder import Folder
from ray_jobs.tune.search import backbone_features as module
from ray_jobs.tune.search.backbone_features import compute_features
from ray_jobs.tune.search.feature_extractor import Extractor, ShardKey
from tests.ray_jobs.tiny import write_prepared
from tests.ray_jobs.tune.search.features import COUNTS, SIZE, spec_of


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features")
    write_prepared(path / "prepared", COUNTS, size=SIZE, texts=True)
    return path


@pytest.fixture(scope="package")
def stored(ray_local: None, folder: Path) -> Folder:
    """Features with one view per image, computed on the cluster."""
    return compute_features(spec_of(folder))


@pytest.fixture
def computed_shards(monkeypatch: pytest.MonkeyPatch) -> list[ShardKey]:
    """Computes features in this process and records the computed shards."""
    keys: list[ShardKey] = []

    def compute(
        spec: RunSpec, missing: Sequence[ShardKey], num_views: int, output: Folder
    ) -> Iterator[tuple[ShardKey, Shard]]:
        extractor = Extractor(spec, num_views, output, threads=2)
        for key in missing:
            keys.append(key)
            yield key, extractor.write(*key)

    monkeypatch.setattr(module, "_run_actors", compute)
    return keys
