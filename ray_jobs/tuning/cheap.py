"""Whether the trials of a search may see features in place of images, and which ones.

Enters: the space and the search's settings.  Leaves: features by what they follow from.
"""

from collections.abc import Iterator
from itertools import product

from mm_model.branches import IMAGE_TOPS
from ray_jobs.cli import JobError
from ray_jobs.report import INFERENCE_ROW_S
from ray_jobs.spec import RunSpec
from ray_jobs.storage import Folder
from ray_jobs.tuning.features import features_of, is_frozen
from ray_jobs.tuning.space import Space, Values
from ray_jobs.tuning.trial import features_key, tells_features

_MOST = 16
"""Sets of features that are computed by themselves, without being asked for."""


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
