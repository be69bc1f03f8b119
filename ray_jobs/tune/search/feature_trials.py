"""Decides whether trials train on features in place of images, and makes their specs.

Input: the search space and the spec of the search. Output: the features by `features_key`, and the
spec of a trial that trains on them.
"""

import json
from collections.abc import Iterator
from itertools import product

from mm_model.backbones import HUB_TEXTS, IMAGE_BACKBONES
from mm_model.branches import IMAGE_TOPS
from mm_model.fusion import TOKEN_FUSIONS
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.telemetry.history_keys import INFERENCE_ROW_S
from ray_jobs.tune.search.backbone_features import compute_features
from ray_jobs.tune.search.space import Space, Values

_MAX_FEATURE_SETS = 16
"""Limit for `tune.feature_cache=auto`."""
_AFFECTING = (
    "data.image_size",
    "model.image.kind",
    "model.image.weights",
    "model.augmentation.",
    "model.activation",
)
"""Settings, or sections of settings, that change the features."""


def should_use_features(spec: RunSpec, space: Space) -> bool:
    """Return whether trials should train on features.

    Raises:
        JobError: If `tune.feature_cache=always`, but trials cannot train on features.
    """
    setting = spec.tune.feature_cache
    if setting == "none" or spec.model.image.kind == "none":
        return False
    if setting == "auto" and not is_frozen(spec):
        return False
    obstacle = _find_obstacle(spec, space)
    if obstacle and setting == "always":
        raise JobError(f"tune.feature_cache=always: {obstacle}; set it to none")
    return not obstacle


def is_frozen(spec: RunSpec) -> bool:
    """Return whether the image backbone is frozen, at least in the first stage of training."""
    image, stages = spec.model.image, spec.train.stages
    if image.kind == "none":
        return False
    return not image.trainable or (bool(stages) and stages[0].backbone == 0)


def compute_feature_sets(spec: RunSpec, space: Space) -> dict[str, Folder]:
    """Compute the features that any trial can need, and return their folders by `features_key`.

    Raises:
        JobError: If features cannot be computed.
    """
    num_views = 1 + spec.tune.feature_views
    folders: dict[str, Folder] = {}
    for values in _combinations(space):
        key = features_key(values, space)
        if key not in folders:
            folders[key] = compute_features(space.spec_of(values), num_views)
    return folders


def features_key(values: Values, space: Space) -> str:
    """Return the values of a trial that determine its features, as JSON."""
    affecting = {path: value for path, value in values.items() if affects_features(path, space)}
    return json.dumps(affecting, sort_keys=True)


def affects_features(path: str, space: Space) -> bool:
    """Return whether trials that differ in a setting can need different features."""
    if path == "model.activation" and "model.image.kind" not in space.distributions:
        # These backbones have a fixed activation.
        return space.base.model.image.kind not in IMAGE_BACKBONES
    if path == "model.fusion.kind" and path in space.distributions:
        # Features of fusions that use tokens contain these.
        kinds = {space.base.model.fusion.kind, *space.distributions[path].values()}
        return not kinds.isdisjoint(TOKEN_FUSIONS)
    return path.startswith(_AFFECTING)


def feature_trial_spec(spec: RunSpec, features: Folder) -> RunSpec:
    """Return the spec of a trial that trains on features in place of images.

    Rows are read in the same order, because the shuffle window has as many rows; if necessary,
    `data.buffer_bytes` is increased. There are fewer layers, so their random numbers differ.

    Args:
        spec: The spec of the same trial on images.
        features: The result of `compute_features`.

    Raises:
        ValueError: If CutMix is enabled, which features do not support.
    """
    if spec.train.cutmix_alpha:
        raise ValueError(
            f"train.cutmix_alpha={spec.train.cutmix_alpha:g} needs images, and this trial trains "
            "on features of a frozen backbone; set it to 0, or set tune.feature_cache=none"
        )
    image_bytes, feature_bytes = (
        read_manifest(folder).splits["train"].row_bytes
        for folder in (Folder(spec.data.prepared), features)
    )
    stages = spec.train.stages
    # Trials drop the stages; the first one freezes pretrained texts as well as images.
    is_frozen = bool(stages) and stages[0].backbone == 0 and spec.model.text.kind in HUB_TEXTS
    data, window_rows = spec.data, spec.data.window_rows(image_bytes)
    while data.window_rows(feature_bytes) < window_rows:
        data = data.model_copy(update={"buffer_bytes": 2 * data.buffer_bytes})
    return spec.overlay(
        {
            "data.prepared": features.uri,
            "data.shuffle_window_rows": window_rows,
            "data.buffer_bytes": data.buffer_bytes,
            # Features are not decoded, so decoding tasks and a cache would be useless.
            "data.decode": "trainer",
            "data.cache": "none",
            "model.image.weights": None,
            "model.text.trainable": spec.model.text.trainable and not is_frozen,
            "train.stages": (),
        }
    )


def _find_obstacle(spec: RunSpec, space: Space) -> str | None:
    """Return why trials cannot train on features, or None if they can."""
    searched = space.distributions
    kinds = {spec.model.image.kind}
    if "model.image.kind" in searched:
        kinds |= set(searched["model.image.kind"].values())
    if unsupported := [kind for kind in sorted(kinds) if kind not in IMAGE_TOPS]:
        return f"model.image.kind={', '.join(unsupported)} has no backbone with features"
    if unfreezing := [p for p in ("model.image.trainable", "train.stages") if p in searched]:
        return f"trials on features cannot vary {', '.join(unfreezing)}"
    if continuous := [path for path in _relevant_paths(space) if searched[path].is_continuous]:
        return f"each value of {', '.join(continuous)} needs different features"
    num_sets = len({features_key(values, space) for values in _combinations(space)})
    if num_sets > _MAX_FEATURE_SETS and spec.tune.feature_cache == "auto":
        return f"the space needs {num_sets} sets of features, more than {_MAX_FEATURE_SETS}"
    if INFERENCE_ROW_S in spec.tune.metrics:
        return f"{INFERENCE_ROW_S} measures the whole model, but such trials build only part of it"
    fusions = {spec.model.fusion.kind}
    if "model.fusion.kind" in searched:
        fusions |= set(searched["model.fusion.kind"].values())
    if spec.tune.feature_cache == "auto" and not fusions.isdisjoint(TOKEN_FUSIONS):
        return (
            "model.fusion.kind=cross_attention needs the features of all tokens, which can take "
            "megabytes per image; tune.feature_cache=always computes them"
        )
    views = "model.image.inference_views"
    if spec.model.image.inference_views > 1 or views in searched:
        return f"{views} averages over several images, and features have one view at inference"
    if spec.train.cutmix_alpha or "train.cutmix_alpha" in searched:
        return "train.cutmix_alpha needs images"
    return None


def _relevant_paths(space: Space) -> list[str]:
    """Return the settings that affect features, and those that their `when` conditions name."""
    paths = [path for path in space.order if affects_features(path, space)]
    for path in paths:
        when = space.distributions[path].when
        paths += [other for other in when if other in space.distributions and other not in paths]
    return paths


def _combinations(space: Space) -> Iterator[Values]:
    paths = _relevant_paths(space)
    for combination in product(*(space.distributions[path].values() for path in paths)):
        chosen = dict(zip(paths, combination, strict=True))
        yield {path: v for path, v in chosen.items() if space.is_active(path, chosen)}
    # The first trials may have values outside the space.
    for values in space.first:
        yield {path: value for path, value in values.items() if path in paths}
