"""Trials that see features in place of images: whether they may, which ones, and as what training.

Enters: the space and the search's settings.  Leaves: features by what they follow from, and the
specification of a training on them.
"""

import json
from collections.abc import Iterator
from itertools import product

from mm_model.branches import IMAGE_TOPS
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.telemetry.console import INFERENCE_ROW_S
from ray_jobs.tune.search.backbone_features import features_of, has_activation_of_ours
from ray_jobs.tune.search.space import Space, Values

_MOST = 16
"""Sets of features that are computed by themselves, without being asked for."""
_AFFECTING = (
    "data.prepared",
    "data.image_size",
    "model.image.kind",
    "model.image.weights",
    "model.augmentation",
    "model.activation",
    "run.seed",
)


def is_frozen(spec: RunSpec) -> bool:
    """Whether the image backbone stands still, at least in a training's first stage."""
    image, stages = spec.model.image, spec.train.stages
    if image.kind == "none":
        return False
    return not image.trainable or (bool(stages) and stages[0].backbone == 0)


def uses_features(spec: RunSpec, space: Space) -> bool:
    """Whether trials are to see features.

    Raises:
        JobError: if they are to by `tune.feature_cache=always`, and cannot.
    """
    settings = spec.tune
    if settings.feature_cache == "none" or spec.model.image.kind == "none":
        return False
    if settings.feature_cache == "auto" and not is_frozen(spec):
        return False
    why_not = _why_not(spec, space)
    if why_not and settings.feature_cache == "always":
        raise JobError(f"tune.feature_cache=always: {why_not}; set it to none")
    return not why_not


def all_features(spec: RunSpec, space: Space) -> dict[str, Folder]:
    """Return the features of all combinations of values that make them differ; computes them.

    Raises:
        JobError: if they cannot be computed.
    """
    num_views = 1 + spec.tune.feature_views
    found: dict[str, Folder] = {}
    for values in _combinations(space):
        key = features_key(values, space)
        if key not in found:
            found[key] = features_of(space.spec_of(values), num_views)
    return found


def on_features(spec: RunSpec, features: Folder) -> RunSpec:
    """Return the specification of a trial on features, from that of the training it stands for.

    The order of its rows is that of the training on images: as many of them are shuffled together,
    where need be by a larger `data.buffer_bytes`. What layers draw at random is not, since there
    are fewer of them.

    Args:
        spec: with the prepared images.
        features: of them, from `features_of`.

    Raises:
        ValueError: if cutmix is asked for, which features cannot do.
    """
    train = spec.train
    if train.cutmix_alpha:
        raise ValueError(
            f"train.cutmix_alpha={train.cutmix_alpha:g} puts boxes into images, and a trial on "
            "features of a frozen backbone sees none; set it to 0, or search on images"
        )
    image_bytes, feature_bytes = (
        read_manifest(folder).splits["train"].row_bytes
        for folder in (Folder(spec.data.prepared), features)
    )
    data, window_rows = spec.data, spec.data.window_rows(image_bytes)
    while data.window_rows(feature_bytes) < window_rows:
        data = data.model_copy(update={"buffer_bytes": 2 * data.buffer_bytes})
    return spec.overlay(
        {
            "data.prepared": features.uri,
            "data.shuffle_window_rows": window_rows,
            "data.buffer_bytes": data.buffer_bytes,
            # There is nothing to decode, so nothing to hand out to others or to keep.
            "data.decode": "trainer",
            "data.cache": "none",
            "model.image.weights": None,
            "train.stages": (),
        }
    )


def tells_features(path: str, space: Space) -> bool:
    """Whether trials with other values of a setting may see other features."""
    # The base says what its own kind of branch goes by; where there are several, one may go by all.
    base = None if "model.image.kind" in space.distributions else space.base
    return affects_features(path, base)


def features_key(values: Values, space: Space) -> str:
    """Return those of a trial's values that its features follow from, as a text."""
    affecting = {path: value for path, value in values.items() if tells_features(path, space)}
    return json.dumps(affecting, sort_keys=True)


def affects_features(path: str, spec: RunSpec | None = None) -> bool:
    """Whether features may be others under another value of a setting.

    Args:
        path: of a field or a section, such as `model.image.kind`.
        spec: of the search; without it every image branch counts, also those in which the backbone
            has `model.activation`, too.
    """
    own = spec is None or has_activation_of_ours(spec.model.image.kind)
    return any(
        f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")
        for other in _AFFECTING
        if own or other != "model.activation"
    )


def _why_not(spec: RunSpec, space: Space) -> str | None:
    kinds = {spec.model.image.kind}
    if "model.image.kind" in space.distributions:
        kinds |= set(space.distributions["model.image.kind"].values())
    if without := [kind for kind in sorted(kinds) if kind not in IMAGE_TOPS]:
        return f"model.image.kind={', '.join(without)} has no backbone whose features are known"
    if thawing := [
        p for p in ("model.image.trainable", "train.stages") if p in space.distributions
    ]:
        return f"{', '.join(thawing)} would make no difference to trials on features"
    paths = _relevant(space)
    if continuous := [path for path in paths if space.distributions[path].is_continuous]:
        return f"every value of {', '.join(continuous)} would make other features"
    keys = {features_key(values, space) for values in _combinations(space)}
    if len(keys) > _MOST and spec.tune.feature_cache == "auto":
        return f"the space has {len(keys)} sets of features"
    if INFERENCE_ROW_S in spec.tune.metrics:
        return f"{INFERENCE_ROW_S} is of the whole model, which such trials do not have"
    if spec.train.cutmix_alpha or "train.cutmix_alpha" in space.distributions:
        return "train.cutmix_alpha puts boxes into images"
    return None


def _relevant(space: Space) -> list[str]:
    """Return the settings that make features differ, and those that their `when` asks about."""
    found = [path for path in space.order if tells_features(path, space)]
    for path in found:
        asked = space.distributions[path].when
        found += [other for other in asked if other in space.distributions and other not in found]
    return found


def _combinations(space: Space) -> Iterator[Values]:
    paths = _relevant(space)
    for combination in product(*(space.distributions[path].values() for path in paths)):
        chosen = dict(zip(paths, combination, strict=True))
        yield {path: v for path, v in chosen.items() if space.counts(path, chosen)}
    # The first trial's, which may lie outside the space.
    for values in space.first:
        yield {path: value for path, value in values.items() if path in paths}
