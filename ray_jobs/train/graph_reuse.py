"""Which settings of a training can change while its graph stays, and how.

A search trains thousands of models whose graphs differ in a few numbers: tracing each anew would
take longer than training many of them.
"""

from collections.abc import Sequence
from typing import Any

from mm_model.tunable import Tunable
from ray_jobs.config.command_line import with_value
from ray_jobs.config.spec import RunSpec

TUNABLE_SETTINGS = (
    "train.learning_rate",
    "train.weight_decay",
    "model.dropout",
    "model.l2",
    "model.numeric.category_dropout",
    "model.fusion.modality_dropout",
    "model.fusion.auxiliary_weight",
)
"""Settings that are numbers to the graph; one that is 0 leaves a part of the graph out."""
_NO_GRAPH = ("run", "prepare", "tune")
"""Sections that have nothing to do with it, but for `run.seed`."""


def make_tunables(spec: RunSpec) -> dict[str, Tunable]:
    """Return a tunable for each setting that can have one, by path; in a strategy's scope."""
    values = {path: value_of(spec, path) for path in TUNABLE_SETTINGS}
    return {path: Tunable(value) for path, value in values.items() if value}


def with_tunables(spec: RunSpec, tunables: dict[str, Tunable]) -> RunSpec:
    """Return a spec with tunables in place of the settings' numbers."""
    for path, tunable in tunables.items():
        spec = _replaced(spec, path.split("."), tunable)
    return spec


def value_of(spec: RunSpec, path: str) -> Any:
    """Return a setting's value by its path."""
    value: Any = spec
    for name in path.split("."):
        value = getattr(value, name)
    return value


def same_graph(spec: RunSpec, other: RunSpec, paths: Sequence[str]) -> bool:
    """Whether specs differ, if at all, in settings at some paths and in what makes no graph."""
    return _graph(spec, paths) == _graph(other, paths)


def _graph(spec: RunSpec, paths: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = spec.model_dump(mode="json", exclude=set(_NO_GRAPH))
    for path in paths:
        tree = with_value(tree, path, None)
    return {**tree, "seed": spec.run.seed}


def _replaced(spec: Any, names: Sequence[str], value: Any) -> Any:
    # Not validated, which would make a plain float of it.
    name, *rest = names
    below = _replaced(getattr(spec, name), rest, value) if rest else value
    return spec.model_copy(update={name: below})
