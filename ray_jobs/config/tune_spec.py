"""Settings of a search: what is tried, who chooses it, what is stopped early, what it may cost.

Imports neither Ray nor TensorFlow nor Optuna.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mm_model.spec import Positive, Spec

Metric = Literal["val/log_loss", "val/roc_auc", "val/pr_auc", "val/accuracy", "inference/row_s"]

PAUSING = ("hyperband", "pbt", "pb2")
"""Schedulers that let trials wait for each other: all of them have to be begun."""
EXPLOITING = ("pbt", "pb2")
"""Schedulers that let a bad trial go on from a good one's weights."""


class DistributionSpec(Spec):
    """Values of one setting: exactly one of the first six, and perhaps when it counts."""

    uniform: tuple[float, float] | None = None
    """Any number between these."""
    loguniform: tuple[Positive, Positive] | None = None
    """Any number between these, each power of ten alike."""
    quniform: tuple[float, float, Positive] | None = None
    """Multiples of the third number between the first two, both included."""
    randint: tuple[int, int] | None = None
    """Whole numbers from the first to before the second, as in Ray and NumPy."""
    lograndint: tuple[PositiveInt, PositiveInt] | None = None
    """The same, each power of ten alike."""
    choice: tuple[Any, ...] | None = None
    """One of these."""
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """It counts where each of these settings has one of these values; elsewhere the specification's
    own value stands."""

    @model_validator(mode="before")
    @classmethod
    def _single_values_as_lists(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("when"), dict):
            return values
        when = {k: v if isinstance(v, list | tuple) else (v,) for k, v in values["when"].items()}
        return {**values, "when": when}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of {', '.join(_KINDS)}" + (f", not {given}" if given else "")
            )
        if self.kind == "choice":
            if not self.choice:
                raise ValueError("choice is empty")
        elif self.low >= self.high or (self.kind in _OF_INTEGERS and self.low > self.high - 1):
            raise ValueError(f"{self.kind}: {self.low:g} is not below {self.high:g}")
        return self

    @property
    def kind(self) -> str:
        """Which kind of distribution it is."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def low(self) -> float:
        """Least value of one that is no choice."""
        return getattr(self, self.kind)[0]

    @property
    def high(self) -> float:
        """Greatest value; of integers one more than that."""
        return getattr(self, self.kind)[1]

    @property
    def is_log(self) -> bool:
        """Whether powers of ten count alike."""
        return self.kind in ("loguniform", "lograndint")

    @property
    def is_continuous(self) -> bool:
        """Whether it has a value between any two."""
        return self.kind in ("uniform", "loguniform")

    def values(self) -> tuple[Any, ...]:
        """Return every value of one that is not continuous, in order."""
        if self.kind == "choice":
            return self.choice or ()
        if self.kind in _OF_INTEGERS:
            return tuple(range(int(self.low), int(self.high)))
        low, high, step = self.quniform or (0.0, 0.0, 1.0)
        count = math.floor((high - low) / step + 1e-9) + 1
        return tuple(round(low + i * step, 12) for i in range(count))

    def contains(self, value: Any) -> bool:
        """Whether a value is one of its own."""
        if self.kind == "choice":
            return value in self.values()
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if self.kind in _OF_INTEGERS:
            return value == int(value) and self.low <= value < self.high
        if not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.quniform[2] if self.quniform else 0.0
        return math.isclose(steps, round(steps), abs_tol=1e-9)


_KINDS = ("uniform", "loguniform", "quniform", "randint", "lograndint", "choice")
_OF_INTEGERS = ("randint", "lograndint")


class BudgetSpec(Spec):
    """What a search may spend, over all its restarts; training the best in full comes on top."""

    trials: PositiveInt = 40
    """Trials, the first one with the specification's own values."""
    hours: Positive | None = None
    """Hours of wall-clock time."""
    cpu_hours: Positive | None = None
    """Hours of logical CPUs that trials held."""
    gpu_hours: Positive | None = None
    """Hours of GPUs that trials held."""


class TuneSpec(Spec):
    """The search: what is tried, what is stopped early, and what it may cost."""

    space: dict[str, DistributionSpec] = Field(default_factory=dict)
    """Values to try, by the path of the setting, such as {train.learning_rate: {loguniform: [1e-5,
    1e-2]}, train.weight_decay: {uniform: [0, 0.1], when: {train.optimizer: [adamw, lamb]}}}."""
    first: tuple[dict[str, Any], ...] = ()
    """Values to try first, by path, after the specification's own, which are always the first
    trial's; what is left out is the specification's own."""
    metrics: tuple[Metric, ...] = ()
    """What the search improves, of each trial's best epoch, by default what `train.monitor` says;
    of several, such as val/log_loss,inference/row_s, the first ranks the trials."""
    searcher: Literal["tpe", "random", "grid", "cmaes", "nsga2"] = "tpe"
    """Who chooses values: Optuna's tree-structured Parzen estimator, chance, every combination in
    order, CMA-ES for numbers, or NSGA-II for several metrics."""
    scheduler: Literal["asha", "hyperband", "median", "pbt", "pb2", "fifo"] = "asha"
    """Who stops trials early: asynchronous successive halving, HyperBand, the median rule, nobody
    (`fifo`); or `pbt` and `pb2`, where the worst go on from the weights of the best with other
    values."""
    grace_epochs: PositiveInt | None = None
    """Epochs that `asha` and `median` give every trial; by default a ninth of train.epochs."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """Of so many trials, `asha` and `hyperband` let one go on at each of their looks."""
    perturbation_epochs: PositiveInt | None = None
    """Epochs between two looks of `pbt` and `pb2`; by default a tenth of train.epochs."""
    seed: NonNegativeInt = 0
    """Seed of what is tried."""
    workers_per_trial: PositiveInt | None = None
    """Worker processes of each trial; by default train.num_workers, the least of them."""
    gpus_per_worker: Positive | None = None
    """GPUs of each worker of a trial, such as 0.25 for small ones; by default
    train.gpus_per_worker."""
    max_concurrent_trials: PositiveInt | None = None
    """Most trials at once; by default as many as the cluster can ever hold, which schedulers that
    let trials wait for each other (`hyperband`, `pbt`, `pb2`) always take."""
    max_failures: NonNegativeInt = 2
    """Losses of a trial's processes or nodes to recover from, each from its checkpoint. An error in
    data or settings ends the trial at once; the search goes on."""
    checkpoint_every_s: Positive = 30.0
    """Seconds of a trial between checkpoints, which come at the ends of epochs."""
    feature_cache: Literal["auto", "always", "none"] = "auto"
    """Compute the features of the frozen image backbone once, and let trials train what is above:
    `auto` where the backbone is frozen, at first at least; `always` takes it as frozen."""
    feature_views: NonNegativeInt = 4
    """Randomly augmented views of each training image among the features; 0 for the plain one
    alone."""
    promote: PositiveInt = 4
    """Best trials on features that are trained in full after the search, to choose from."""
    budget: BudgetSpec = BudgetSpec()

    @model_validator(mode="after")
    def _metrics_fit(self) -> Self:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics={','.join(self.metrics)} names one twice")
        if len(self.metrics) > 1 and self.searcher == "cmaes":
            raise ValueError("searcher=cmaes takes one metric; tpe, nsga2 and random take several")
        return self

    @model_validator(mode="after")
    def _searcher_fits_the_space(self) -> Self:
        continuous = [path for path, values in self.space.items() if values.is_continuous]
        if self.searcher == "grid" and continuous:
            raise ValueError(
                f"searcher=grid cannot go through {', '.join(continuous)}; give them as choice, "
                "quniform or randint"
            )
        wrong = [path for path, values in self.space.items() if not values.is_continuous]
        if self.scheduler == "pb2" and wrong:
            raise ValueError(
                f"scheduler=pb2 takes uniform and loguniform alone, not what {', '.join(wrong)} "
                "has; pbt takes any"
            )
        if self.scheduler in EXPLOITING and len(self.metrics) > 1:
            raise ValueError(f"scheduler={self.scheduler} takes one metric")
        if self.scheduler in EXPLOITING and self.metrics == ("inference/row_s",):
            raise ValueError(
                f"scheduler={self.scheduler} compares what trials learn, and metrics="
                "inference/row_s is none of it"
            )
        return self
