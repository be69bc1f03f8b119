"""Features of a frozen backbone: their storage and their reuse."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_model.spec import AugmentationSpec
from ray_jobs.cluster.strategy import WorkerContext
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import Split
from ray_jobs.config.spec import InspectSpec, RunSpec
from ray_jobs.data.batch import FEATURES, IMAGE_MASK
from ray_jobs.data.decoder import RowDecoder
from ray_jobs.data.manifest import ImageInfo, read_manifest, require_shards
from ray_jobs.inspect.job import inspect
from ray_jobs.storage.folder import Folder
from ray_jobs.train.loop import Loop
from ray_jobs.train.model_factory import new_model
from ray_jobs.tune.search.backbone_features import compute_features, features_folder
from ray_jobs.tune.search.feature_extractor import Extractor
from ray_jobs.tune.search.feature_trials import feature_trial_spec
from tests.mm_model.examples import with_random_heads
from tests.ray_jobs.tiny import write_prepared
from tests.ray_jobs.tune.search.features import (
    COUNTS,
    SIZE,
    copy_weights,
    features_in,
    hashes,
    inputs_of,
    rows_of,
    shards,
    spec_of,
)

# -- storage --------------------------------------------------------------------------------------


def test_features_keep_the_rows_row_groups_and_shards_of_the_images(folder, stored):
    source = Folder(folder / "prepared")
    images, own = read_manifest(source), read_manifest(stored)
    assert stored.uri.startswith(f"{folder}/runs/features/")
    assert own.image == images.image.model_copy(update={"encoding": "raw", "features": (1, 64)})
    for split in ("train", "validation"):
        for image_shard, shard in zip(shards(images, split), shards(own, split), strict=True):
            assert shard.row_groups == image_shard.row_groups
            with pq.ParquetFile(stored.locate(shard.path)) as file:
                groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            assert tuple(groups) == shard.row_groups
            assert hashes(stored)[shard.path][0] == shard.sha256
        before, after = (rows_of(f, m, split) for f, m in ((source, images), (stored, own)))
        before = before.drop_columns("original_pixels")  # not needed for training
        assert after.schema.names == before.schema.names
        assert after.drop_columns("image").equals(before.drop_columns("image"))
    require_shards(stored, own)
    assert own.splits["test"].num_rows == 0
    kept = own.model_copy(update={"image": images.image, "splits": images.splits})
    assert kept == images


def test_features_come_from_the_initial_backbone_of_a_training_with_the_same_seed(folder, stored):
    import keras

    from mm_model.model import backbone_model

    manifest = read_manifest(Folder(folder / "prepared"))
    loop = Loop(spec_of(folder), manifest, WorkerContext())
    for split in ("train", "validation"):
        table = rows_of(Folder(folder / "prepared"), manifest, split)
        images = RowDecoder(manifest, with_image=True).decode(table)["image"]
        expected = np.asarray(backbone_model(loop.model)(images))
        np.testing.assert_allclose(features_in(stored, split)[:, 0], expected, atol=1e-5)
        assert expected.std(axis=0).max() > 0.01
    keras.utils.set_random_seed(4)
    other = backbone_model(new_model(spec_of(folder), manifest))(images)
    assert np.abs(np.asarray(other) - expected).max() > 0.01


def test_only_missing_and_damaged_shards_are_computed_after_an_interruption(
    folder, computed_shards, tmp_path
):
    spec = spec_of(folder, run__storage_path=str(tmp_path), model__augmentation__flip="vertical")
    output = compute_features(spec, num_views=2)
    every = [("train", 0), ("train", 1), ("train", 2), ("validation", 0), ("validation", 1)]
    assert computed_shards == every
    manifest, before = read_manifest(output), hashes(output)
    computed_shards.clear()
    lost, cut = (shards(manifest, split)[1].path for split in ("train", "validation"))
    output.delete("manifest.json")
    output.delete(lost)
    path = Path(output.locate(cut))
    path.write_bytes(path.read_bytes()[:-1])
    assert compute_features(spec, num_views=2).uri == output.uri
    assert computed_shards == [("train", 1), ("validation", 1)]
    after = hashes(output)
    for name in before:
        assert after[name][0] == before[name][0]
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"manifest.json", lost, cut}
    # Other settings of the trainable layers reuse them all.
    computed_shards.clear()
    other = spec.overlay({"model.dropout": 0.4, "train.learning_rate": 0.1})
    assert compute_features(other, num_views=2).uri == output.uri
    assert computed_shards == []
    assert hashes(output) == after


def test_the_folder_depends_on_the_settings_that_affect_features(folder, tmp_path):
    for name, content in (("a", b"weights"), ("b", b"weights"), ("c", b"others")):
        (tmp_path / name).write_bytes(content)

    def place(num_views: int = 1, kind: str = "efficientnet_b0", **changes: Any) -> str:
        image = {"model__image__kind": kind, "model__image__weights": str(tmp_path / "a")}
        return features_folder(spec_of(folder, **image | changes), num_views).uri

    more_rows = tmp_path / "prepared"
    write_prepared(more_rows, {**COUNTS, "validation": 23}, size=SIZE)
    others = [
        place(),
        place(num_views=2),
        place(num_views=3),
        place(kind="mobilenet_v3_small"),
        place(model__image__weights=str(tmp_path / "c")),
        place(model__image__weights=None),
        place(model__image__weights=None, run__seed=4),
        place(model__image__weights=None, model__augmentation__zoom=0.2),
        place(kind="tiny", model__image__weights=None),
        place(kind="tiny", model__image__weights=None, model__activation="gelu"),
        place(num_views=2, run__seed=4),
        place(num_views=2, model__augmentation__zoom=0.2),
        place(data__image_size=16),
        place(data__prepared=str(more_rows)),
        place(run__storage_path=str(tmp_path)),
    ]
    assert len(set(others)) == len(others)
    # Settings that do not affect features.
    for same in (
        place(run__seed=4),
        place(model__image__trainable=True),
        place(model__image__weights=str(tmp_path / "b")),
        place(model__augmentation__zoom=0.2),
        place(model__activation="gelu"),
        place(model__dropout=0.5, model__image__units=8, train__epochs=9),
        place(data__image_size=SIZE),
    ):
        assert same == others[0]


def test_unsuitable_settings_and_data_are_reported(ray_local, folder, stored):
    weights = str(folder / "prepared/manifest.json")
    for changes, message in (
        ({"model__image__weights": weights}, r"^cannot compute features: .*kind=tiny"),
        ({"model__image__kind": "none"}, r"model\.image\.kind=none has no backbone"),
        ({"data__prepared": stored.uri}, "contains features already"),
    ):
        with pytest.raises(JobError, match=message):
            compute_features(spec_of(folder, **changes))
    with pytest.raises(JobError, match="holds features, not images"):
        inspect(InspectSpec(prepared=stored.uri))


# -- augmented views ------------------------------------------------------------------------------


def test_augmented_views_differ_and_do_not_depend_on_the_order_of_computation(folder, tmp_path):
    spec = spec_of(folder, model__augmentation=AugmentationSpec().model_dump())

    def computed(
        order: Sequence[int], spec: RunSpec = spec, num_views: int = 3, split: Split = "train"
    ) -> list[np.ndarray]:
        """Return the features of shards, which are computed in the given order."""
        extractor, found = Extractor(spec, num_views, Folder(tmp_path)), {}
        for i in order:
            cells = pq.read_table(tmp_path / extractor.write(split, i).path)["image"].to_pylist()
            found[i] = [np.frombuffer(cell, np.float32).reshape(num_views, -1) for cell in cells]
        return [np.stack(found[i]) for i in sorted(found)]

    first, second = computed((0, 1)), computed((2, 1, 0))
    # A backbone that a stage freezes also keeps its batch norm statistics.
    (by_stage,) = computed((0,), spec.overlay({"model.image.trainable": True}))
    np.testing.assert_array_equal(by_stage, first[0])
    for i in (0, 1):
        np.testing.assert_array_equal(first[i], second[i])
        assert first[i].shape == (20, 3, 64)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(first[0][:, a] - first[0][:, b]).max(axis=1) > 1e-3).all()
    (plain,) = computed((0,), num_views=1)
    np.testing.assert_array_equal(plain[:, 0], first[0][:, 0])
    # Shards and rows draw different random numbers.
    shifts = [first[i][:, 1] - first[i][:, 0] for i in (0, 1)]
    assert len(np.unique(np.concatenate(shifts).round(4), axis=0)) > 30
    (of_other_seed,) = computed((0,), spec.overlay({"run.seed": 4}))
    assert np.abs(of_other_seed - first[0]).max() > 1e-3
    # Validation rows repeat the unchanged image in every view.
    (unchanged,) = computed((1,), split="validation")
    assert unchanged.std() > 0
    np.testing.assert_array_equal(unchanged, unchanged[:, :1].repeat(3, axis=1))


# -- several images a row -------------------------------------------------------------------------


def test_a_missing_image_among_several_has_no_features(tmp_path, computed_shards):
    one = write_prepared(tmp_path / "prepared", COUNTS, size=SIZE)
    source = Folder(tmp_path / "prepared")
    splits = dict(one.splits)
    for split in ("train", "validation"):
        changed = []
        for shard in shards(one, split):
            path = Path(source.locate(shard.path))
            table = pq.read_table(path)
            back = table["image"].to_pylist()[::-1]
            back[1::3] = [None] * len(back[1::3])
            table = table.set_column(1, "image_front", table["image"])
            table = table.add_column(2, "image_back", pa.array(back, pa.binary()))
            pq.write_table(table, path, row_group_size=5)
            changed.append(shard.model_copy(update={"num_bytes": path.stat().st_size}))
        splits[split] = one.splits[split].model_copy(update={"shards": tuple(changed)})
    image = ImageInfo(height=SIZE, width=SIZE, names=("front", "back"))
    several = one.model_copy(update={"image": image, "splits": splits})
    several.write(source)
    spec = spec_of(tmp_path)
    output = compute_features(spec)
    own = read_manifest(output)
    table = rows_of(output, own, "train")
    rows = RowDecoder(own, with_image=True).decode(table)
    pixels = RowDecoder(several, with_image=True).decode(rows_of(source, several, "train"))
    assert rows[FEATURES].shape == (53, 2, 1, 64)
    np.testing.assert_array_equal(rows[IMAGE_MASK], pixels[IMAGE_MASK])
    assert not rows[FEATURES][rows[IMAGE_MASK] == 0].any()
    assert (rows[IMAGE_MASK][:, 0] == 1).all()
    assert 10 < (rows[IMAGE_MASK][:, 1] == 0).sum() < 25
    assert table.schema.field("image_back").nullable
    # With equal weights, features and images give the same predictions.
    full = Loop(spec, several, WorkerContext()).model
    small = Loop(feature_trial_spec(spec, output), own, WorkerContext()).model
    with_random_heads(small)
    copy_weights(small, full)
    expected = np.asarray(full(inputs_of(full, pixels)))
    np.testing.assert_allclose(np.asarray(small(inputs_of(small, rows))), expected, atol=1e-5)
    assert expected.std() > 0.01
