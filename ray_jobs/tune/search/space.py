"""The search space of a spec: which values of which settings, checked before anything starts.

Enters: `tune.space` and the spec around it.  Leaves: values by path, and the spec that they make.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, get_args

from mm_model.nearest_match import did_you_mean
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.tune_spec import EXPLOITING, DistributionSpec, TuneSpec

Values = dict[str, Any]
"""Values of settings by their paths, such as {"train.learning_rate": 1e-3}."""
Suggest = Callable[[str, DistributionSpec], Any]

_NOT_SEARCHED = ("run.", "prepare.", "tune.", "data.prepared", "train.monitor", "train.num_workers")
"""What says where and how a search runs, or what it goes by."""
_KEEP_THE_WEIGHTS = (
    "train.learning_rate", "train.weight_decay", "train.momentum", "train.label_smoothing",
    "train.focal_gamma", "train.clip_norm", "model.dropout", "model.l2",
    "model.fusion.modality_dropout", "model.fusion.auxiliary_weight",
    "model.numeric.category_dropout",
)  # fmt: skip
"""Settings that another trial's weights and optimizer state can go on with."""
_LAYERS_FROM_ZERO = ("model.dropout", "model.fusion.modality_dropout")
"""Of these a rate of 0 leaves out a layer, whose random state would be missing."""


class Space:
    """What a search chooses from.

    Args:
        spec: whole specification; its own values are the first trial's.

    Raises:
        ValueError: naming every setting that does not exist, and every value that does not fit.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.base = spec.model_copy(update={"tune": TuneSpec()})
        """What trials are trained by, but for the values."""
        self._own = self.base.model_dump(mode="json")
        self.distributions = {p: _with_none(d, p) for p, d in spec.tune.space.items()}
        self.order = self._ordered()
        """Paths, each after those that its `when` asks about."""
        self._require_searchable(spec.tune)
        self._require_fitting()
        self.first = self._first(spec.tune.first)
        """Values of the first trials: the spec's own, then those given."""

    def values(self, suggest: Suggest) -> Values:
        """Return one value of each setting that counts.

        Args:
            suggest: chooses one, given the path; is asked in order.
        """
        values: Values = {}
        for path in self.order:
            if self.counts(path, values):
                values[path] = suggest(path, self.distributions[path])
        return values

    def counts(self, path: str, values: Mapping[str, Any]) -> bool:
        """Whether a setting counts beside the values of others."""
        when = self.distributions[path].when
        return all(
            any(_same(values.get(other, self.own(other)), value) for value in allowed)
            for other, allowed in when.items()
        )

    def own(self, path: str) -> Any:
        """Return the spec's own value of a setting."""
        value: Any = self._own
        for name in path.split("."):
            value = value[name]
        return value

    def contains(self, values: Values) -> bool:
        """Whether each value is one that the search could choose."""
        return all(
            any(_same(value, one) for one in distribution.values())
            if (distribution := self.distributions[path]).kind == "choice"
            else distribution.contains(value)
            for path, value in values.items()
        )

    def spec_of(self, values: Mapping[str, Any]) -> RunSpec:
        """Return the spec of a trial.

        Raises:
            ValueError: if the values do not go together.
        """
        return self.base.overlay(dict(values))

    def grid(self) -> Iterator[Values]:
        """Yield every combination that differs, the last path's values changing fastest."""
        seen: list[Values] = []
        choices = [self.distributions[path].values() for path in self.order]
        for combination in product(*choices):
            chosen = dict(zip(self.order, combination, strict=True))
            values = self.values(lambda path, _, chosen=chosen: chosen[path])
            if values not in seen:
                seen.append(values)
                yield values

    # -- checks -----------------------------------------------------------------------------------

    def _ordered(self) -> list[str]:
        from ray_jobs.config.command_line import flatten

        fields = list(flatten(RunSpec))
        wanted = [*self.distributions, *(p for d in self.distributions.values() for p in d.when)]
        unknown = [path for path in dict.fromkeys(wanted) if path not in fields]
        if unknown:
            raise ValueError(
                "tune.space: "
                + "; ".join(f"{path} is no setting{did_you_mean(path, fields)}" for path in unknown)
            )
        ordered: list[str] = []
        left = list(self.distributions)
        while left:
            ready = [p for p in left if not set(self.distributions[p].when) & set(left)]
            if not ready:
                raise ValueError(f"tune.space: {', '.join(left)} wait for each other's `when`")
            ordered += ready
            left = [path for path in left if path not in ready]
        return ordered

    def _require_searchable(self, tune: TuneSpec) -> None:
        wrong = [path for path in self.distributions if path.startswith(_NOT_SEARCHED)]
        if wrong:
            raise ValueError(f"tune.space: {', '.join(wrong)} cannot be searched over")
        if tune.scheduler not in EXPLOITING:
            return
        wrong = [path for path in self.distributions if path not in _KEEP_THE_WEIGHTS]
        if wrong:
            raise ValueError(
                f"tune.scheduler={tune.scheduler} goes on from another trial's weights, which "
                f"{', '.join(wrong)} may not fit (accepted: {', '.join(_KEEP_THE_WEIGHTS)})"
            )
        if self.base.train.schedule == "plateau" and "train.learning_rate" in self.distributions:
            raise ValueError(
                f"tune.scheduler={tune.scheduler} would take over another trial's learning rate, "
                "which train.schedule=plateau has lowered; choose another schedule"
            )
        conditional = [path for path, d in self.distributions.items() if d.when]
        if conditional:
            raise ValueError(
                f"tune.scheduler={tune.scheduler} knows no `when` ({', '.join(conditional)})"
            )
        for path in set(_LAYERS_FROM_ZERO) & set(self.distributions):
            values = self.distributions[path]
            if not min(values.values() if values.kind == "choice" else (values.low,)) > 0:
                raise ValueError(
                    f"tune.scheduler={tune.scheduler}: {path} must stay above 0, where its layer "
                    "has no state to go on from"
                )

    def _require_fitting(self) -> None:
        """Check by each setting's ends, and a value between them, that specs can be made of it."""
        errors: dict[str, None] = {}
        for path in self.order:
            for value in self._probes(self.distributions[path]):
                try:
                    self.spec_of(self._with(path, value))
                except ValueError as error:
                    errors[f"tune.space: {error}"] = None
                    break
        if errors:
            raise ValueError("\n".join(errors))

    @staticmethod
    def _probes(values: DistributionSpec) -> Sequence[Any]:
        if values.kind == "choice":
            return values.values()
        if not values.is_continuous:
            every = values.values()
            return every[0], every[-1]
        # Between them, so that whole numbers at both ends do not hide that others are wanted.
        return values.low, values.low + 0.381966 * (values.high - values.low), values.high

    def _with(self, path: str, value: Any) -> Values:
        """Return values with one given, and others as near to the spec's own as they can be."""
        forced = {path: value}
        pending = [path]
        while pending:
            for other, allowed in self.distributions[pending.pop()].when.items():
                if other in self.distributions and other not in forced:
                    forced[other] = next(
                        (v for v in allowed if _same(v, self.own(other))), allowed[0]
                    )
                    pending.append(other)

        def suggest(path: str, values: DistributionSpec) -> Any:
            if path in forced:
                return forced[path]
            own = self.own(path)
            return own if self.contains({path: own}) else self._probes(values)[0]

        return self.values(suggest)

    def _first(self, points: Sequence[Mapping[str, Any]]) -> list[Values]:
        first = []
        for place, given in enumerate(({}, *points)):
            point = {path: _none_by_name(path, value) for path, value in given.items()}
            unknown = [path for path in point if path not in self.distributions]
            if unknown:
                raise ValueError(f"tune.first: {', '.join(unknown)} not in tune.space")
            values = self.values(lambda path, _, point=point: point.get(path, self.own(path)))
            idle = [path for path in point if path not in values]
            if idle:
                raise ValueError(f"tune.first, point {place}: {', '.join(idle)} has no effect")
            try:
                self.spec_of(values)
            except ValueError as error:
                raise ValueError(f"tune.first, point {place}: {error}") from error
            if values not in first:
                first.append(values)
        return first


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a setting are the same: true is not 1, and a tuple is a list."""
    one, other = (list(value) if isinstance(value, tuple) else value for value in (one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _with_none(values: DistributionSpec, path: str) -> DistributionSpec:
    """Return a distribution with no value in place of the word `none`."""
    choice = values.choice
    if choice is not None:
        choice = tuple(_none_by_name(path, value) for value in choice)
    when = {
        other: tuple(_none_by_name(other, value) for value in allowed)
        for other, allowed in values.when.items()
    }
    return values.model_copy(update={"choice": choice, "when": when})


def _none_by_name(path: str, value: Any) -> Any:
    """Return a setting's value, None for the word `none` where the setting may have no value."""
    from ray_jobs.config.command_line import flatten

    field = flatten(RunSpec).get(path)
    optional = field is not None and type(None) in get_args(field.annotation)
    return None if optional and value in ("none", "null") else value
