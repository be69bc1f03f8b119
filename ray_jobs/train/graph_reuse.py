"""Decides whether a training run can reuse the graph of another run with other settings.

A search trains thousands of models that differ in a few numbers. Tracing a graph for each would
take longer than training many of them, so these numbers become variables of the graph.
"""

from collections.abc import Sequence
from operator import attrgetter
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
"""Settings that can be variables of the graph; a value of 0 removes a part of the graph."""
_NO_GRAPH = ("run", "prepare", "tune")
"""Sections that do not affect the graph, except for `run.seed`."""


def make_tunables(spec: RunSpec) -> dict[str, Tunable]:
    """Return a tunable for each non-zero setting, by path; call this in the strategy's scope."""
    values = {path: attrgetter(path)(spec) for path in TUNABLE_SETTINGS}
    return {path: Tunable(value) for path, value in values.items() if value}


def with_tunables(spec: RunSpec, tunables: dict[str, Tunable]) -> RunSpec:
    """Return a spec with the tunables in place of the settings' numbers."""
    for path, tunable in tunables.items():
        spec = _replaced(spec, path.split("."), tunable)
    return spec


def same_graph(spec: RunSpec, other: RunSpec, paths: Sequence[str]) -> bool:
    """Whether two specs have the same graph, if the settings at `paths` are tunable."""
    return _graph(spec, paths) == _graph(other, paths)


def _graph(spec: RunSpec, paths: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = spec.model_dump(mode="json", exclude=set(_NO_GRAPH))
    for path in paths:
        tree = with_value(tree, path, None)
    return {**tree, "seed": spec.run.seed}


def _replaced(spec: Any, names: Sequence[str], value: Any) -> Any:
    # Without validation, which would convert the value to a plain float.
    name, *rest = names
    child = _replaced(getattr(spec, name), rest, value) if rest else value
    return spec.model_copy(update={name: child})
