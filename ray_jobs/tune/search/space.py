"""Validates the search space of a spec and turns the values of a trial into a spec.

Input: `tune.space` and the rest of the spec. Output: values by setting path, and the trial's spec.
Imports neither Ray nor Optuna.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any, Self, get_args

from pydantic import model_validator
from pydantic.fields import FieldInfo

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.command_line import flatten
from ray_jobs.config.errors import UsageError
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.tune_spec import EXPLOITING, DistributionSpec, TuneSpec

Values = dict[str, Any]
"""Values of settings by path, such as {"train.learning_rate": 1e-3}."""
Suggest = Callable[[str, DistributionSpec], Any]

_NOT_SEARCHABLE = (
    "run.", "prepare.", "tune.", "data.prepared", "train.monitor", "train.num_workers",
)  # fmt: skip
"""Settings that define where and how a search runs, and how it ranks trials."""
_CLONEABLE = (
    "train.learning_rate", "train.weight_decay", "train.momentum", "train.label_smoothing",
    "train.focal_gamma", "train.clip_norm", "model.dropout", "model.l2",
    "model.fusion.modality_dropout", "model.fusion.auxiliary_weight",
    "model.numeric.category_dropout",
)  # fmt: skip
"""Settings that may change when a trial continues from another trial's training state."""
_ABSENT_AT_ZERO = ("model.dropout", "model.fusion.modality_dropout")
"""A rate of 0 removes the layer, so a checkpoint lacks its random state."""


class Space:
    """The values that a search chooses from.

    Args:
        spec: The whole spec; the first trial uses its own values.

    Raises:
        UsageError: If a setting does not exist or a value is invalid; the error names all of them.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.base = spec.model_copy(update={"tune": TuneSpec()})
        """The spec of every trial, apart from the searched values."""
        self._base_tree = self.base.model_dump(mode="json")
        self.distributions = {p: _with_none(d, p) for p, d in spec.tune.space.items()}
        self.order = self._sorted_paths()
        """Paths in an order in which each one follows the paths that its `when` names."""
        self._require_searchable(spec.tune)
        self._require_valid_values()
        self.first = self._first_points(spec.tune.first)
        """Values of the first trials: the spec's own values, then `tune.first`."""

    def values(self, suggest: Suggest) -> Values:
        """Return a value for each active setting.

        Args:
            suggest: Chooses the value of a setting; called in the order of `self.order`.
        """
        values: Values = {}
        for path in self.order:
            if self.is_active(path, values):
                values[path] = suggest(path, self.distributions[path])
        return values

    def is_active(self, path: str, values: Mapping[str, object]) -> bool:
        """Return whether the `when` condition of a setting holds, given other settings' values."""
        when = self.distributions[path].when
        return all(
            any(_same(values.get(other, self._own_value(other)), value) for value in allowed)
            for other, allowed in when.items()
        )

    def _own_value(self, path: str) -> Any:
        """Return the value of a setting in the spec."""
        value: Any = self._base_tree
        for name in path.split("."):
            value = value[name]
        return value

    def contains(self, values: Values) -> bool:
        """Return whether the search could choose each of these values."""
        return all(
            any(_same(value, choice) for choice in distribution.values())
            if (distribution := self.distributions[path]).kind == "choice"
            else distribution.contains(value)
            for path, value in values.items()
        )

    def spec_of(self, values: Mapping[str, Any]) -> RunSpec:
        """Return the spec of a trial.

        Raises:
            ValueError: If the values are invalid in combination.
        """
        return self.base.overlay(dict(values))

    def grid(self) -> Iterator[Values]:
        """Yield every distinct combination; the value of the last path changes fastest."""
        seen: list[Values] = []
        choices = [self.distributions[path].values() for path in self.order]
        for combination in product(*choices):
            chosen = dict(zip(self.order, combination, strict=True))
            values = self.values(lambda path, _, chosen=chosen: chosen[path])
            if values not in seen:
                seen.append(values)
                yield values

    # -- checks -----------------------------------------------------------------------------------

    def _sorted_paths(self) -> list[str]:
        paths = [*self.distributions, *(p for d in self.distributions.values() for p in d.when)]
        if unknown := [path for path in dict.fromkeys(paths) if path not in _fields()]:
            fields = list(_fields())
            raise UsageError(
                "tune.space: "
                + "; ".join(f"no setting {path}{did_you_mean(path, fields)}" for path in unknown)
            )
        ordered: list[str] = []
        left = list(self.distributions)
        while left:
            ready = [p for p in left if not set(self.distributions[p].when) & set(left)]
            if not ready:
                raise UsageError(
                    f"tune.space: the `when` conditions of {', '.join(left)} form a cycle; "
                    "remove one of them"
                )
            ordered += ready
            left = [path for path in left if path not in ready]
        return ordered

    def _require_searchable(self, tune: TuneSpec) -> None:
        if fixed := [path for path in self.distributions if path.startswith(_NOT_SEARCHABLE)]:
            raise UsageError(f"tune.space: cannot search over {', '.join(fixed)}; leave it out")
        if tune.scheduler not in EXPLOITING:
            return
        scheduler = f"tune.scheduler={tune.scheduler}"
        if wrong := [path for path in self.distributions if path not in _CLONEABLE]:
            raise UsageError(
                f"{scheduler} continues from another trial's weights, which do not fit other "
                f"values of {', '.join(wrong)}; choose another scheduler, or search only over "
                f"{', '.join(_CLONEABLE)}"
            )
        if self.base.train.schedule == "plateau" and "train.learning_rate" in self.distributions:
            raise UsageError(
                f"{scheduler} cannot search over train.learning_rate with train.schedule=plateau: "
                "a trial would inherit the lowered rate of another trial; choose another schedule"
            )
        if conditional := [path for path, d in self.distributions.items() if d.when]:
            raise UsageError(
                f"{scheduler} does not support `when` ({', '.join(conditional)}); remove it, or "
                "choose another scheduler"
            )
        for path in set(_ABSENT_AT_ZERO) & set(self.distributions):
            values = self.distributions[path]
            if not min(values.values() if values.kind == "choice" else (values.low,)) > 0:
                raise UsageError(
                    f"{scheduler}: {path} must stay above 0; at 0 its layer has no state that "
                    "another trial could continue from"
                )

    def _require_valid_values(self) -> None:
        """Build specs from the end points and one inner value of each setting."""
        errors: dict[str, None] = {}
        for path in self.order:
            for value in _probes(self.distributions[path]):
                try:
                    self.spec_of(self._values_around(path, value))
                except ValueError as error:
                    errors[f"tune.space: {error}"] = None
                    break
        if errors:
            raise UsageError("\n".join(errors))

    def _values_around(self, path: str, value: Any) -> Values:
        """Return values that include a given one; the others equal the spec's own if possible."""
        forced = {path: value}
        pending = [path]
        while pending:
            for other, allowed in self.distributions[pending.pop()].when.items():
                if other in self.distributions and other not in forced:
                    own = self._own_value(other)
                    forced[other] = next((v for v in allowed if _same(v, own)), allowed[0])
                    pending.append(other)

        def suggest(path: str, values: DistributionSpec) -> Any:
            if path in forced:
                return forced[path]
            own = self._own_value(path)
            return own if self.contains({path: own}) else _probes(values)[0]

        return self.values(suggest)

    def _first_points(self, points: Sequence[Mapping[str, Any]]) -> list[Values]:
        first = []
        for number, given in enumerate(({}, *points)):
            point = {path: _parse_none(path, value) for path, value in given.items()}
            if unknown := [path for path in point if path not in self.distributions]:
                raise UsageError(
                    f"tune.first, point {number}: tune.space does not contain "
                    f"{', '.join(unknown)}; leave it out, or add it to the space"
                )
            values = self.values(
                lambda path, _, point=point: point.get(path, self._own_value(path))
            )
            if inactive := [path for path in point if path not in values]:
                raise UsageError(
                    f"tune.first, point {number}: the `when` condition of {', '.join(inactive)} "
                    "does not hold; leave it out"
                )
            try:
                self.spec_of(values)
            except ValueError as error:
                raise UsageError(f"tune.first, point {number}: {error}") from error
            if values not in first:
                first.append(values)
        return first


class SearchSpec(RunSpec):
    """The spec of `tune`: a `RunSpec` whose search space is valid."""

    @model_validator(mode="after")
    def _require_valid_space(self) -> Self:
        if self.tune.space or self.tune.first:
            Space(self)
        return self


def _probes(values: DistributionSpec) -> Sequence[Any]:
    if values.kind == "choice":
        return values.values()
    if not values.is_continuous:
        every = values.values()
        return every[0], every[-1]
    # The inner value is fractional, so an integer setting fails even if both ends are integers.
    return values.low, values.low + 0.381966 * (values.high - values.low), values.high


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are equal; true differs from 1, and a tuple equals a list."""
    one, other = (list(value) if isinstance(value, tuple) else value for value in (one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _with_none(values: DistributionSpec, path: str) -> DistributionSpec:
    """Return a distribution in which None replaces the word `none`."""
    choice = values.choice and tuple(_parse_none(path, value) for value in values.choice)
    when = {
        other: tuple(_parse_none(other, value) for value in allowed)
        for other, allowed in values.when.items()
    }
    return values.model_copy(update={"choice": choice, "when": when})


def _parse_none(path: str, value: Any) -> Any:
    """Return None for the words `none` and `null` if the setting is optional."""
    field = _fields().get(path)
    optional = field is not None and type(None) in get_args(field.annotation)
    return None if optional and value in ("none", "null") else value


@cache
def _fields() -> dict[str, FieldInfo]:
    return flatten(RunSpec)
