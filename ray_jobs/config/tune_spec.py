"""Settings of `tune`: search space, searcher, scheduler and budget.

Imports neither Ray nor TensorFlow nor Optuna.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mm_model.spec import Positive, Spec

Metric = Literal["val/log_loss", "val/roc_auc", "val/pr_auc", "val/accuracy", "inference/row_s"]

PAUSING = ("hyperband", "pbt", "pb2")
"""Schedulers that pause a trial until the others catch up.

Every trial of the search must be started, or the paused ones wait forever.
"""
EXPLOITING = ("pbt", "pb2")
"""Schedulers that make a bad trial continue from the weights of a good one."""


class DistributionSpec(Spec):
    """Values of one setting: exactly one distribution, and optionally a condition."""

    uniform: tuple[float, float] | None = None
    """Real numbers in this range."""
    loguniform: tuple[Positive, Positive] | None = None
    """Real numbers in this range, uniform in the logarithm."""
    quniform: tuple[float, float, Positive] | None = None
    """The first number plus multiples of the third, up to the second (inclusive)."""
    randint: tuple[int, int] | None = None
    """Integers from the first number up to the second (exclusive), as in Ray and NumPy."""
    lograndint: tuple[PositiveInt, PositiveInt] | None = None
    """Integers like `randint`, uniform in the logarithm."""
    choice: tuple[Any, ...] | None = None
    """One of these values."""
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Search this setting only if each of these settings has one of the given values; otherwise it
    keeps the spec's own value."""

    @model_validator(mode="before")
    @classmethod
    def _single_values_as_lists(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("when"), dict):
            return values
        when = {k: v if isinstance(v, list | tuple) else (v,) for k, v in values["when"].items()}
        return {**values, "when": when}

    @model_validator(mode="after")
    def _require_one_distribution(self) -> Self:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            names = f", not {' and '.join(given)}" if given else ""
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}{names}")
        if self.kind == "choice":
            if not self.choice:
                raise ValueError("choice needs at least one value")
        elif self.low >= self.high:
            raise ValueError(
                f"{self.kind}: the lower bound {self.low:g} must be below the upper bound "
                f"{self.high:g}"
            )
        return self

    @property
    def kind(self) -> str:
        """Name of the distribution."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def low(self) -> float:
        """Lower bound; undefined for a choice."""
        return getattr(self, self.kind)[0]

    @property
    def high(self) -> float:
        """Upper bound, exclusive for integers; undefined for a choice."""
        return getattr(self, self.kind)[1]

    @property
    def is_log(self) -> bool:
        """Whether the distribution is uniform in the logarithm."""
        return self.kind in ("loguniform", "lograndint")

    @property
    def is_continuous(self) -> bool:
        """Whether the values are real numbers without a step."""
        return self.kind in ("uniform", "loguniform")

    def values(self) -> tuple[Any, ...]:
        """Return, in order, every value of a distribution that is not continuous."""
        if self.kind == "choice":
            return self.choice or ()
        if self.kind in _INTEGER_KINDS:
            return tuple(range(int(self.low), int(self.high)))
        low, high, step = self.quniform or (0.0, 0.0, 1.0)
        count = math.floor((high - low) / step + 1e-9) + 1
        return tuple(round(low + i * step, 12) for i in range(count))

    def contains(self, value: Any) -> bool:
        """Return whether the distribution can produce a value."""
        if self.kind == "choice":
            return value in self.values()
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if self.kind in _INTEGER_KINDS:
            return value == int(value) and self.low <= value < self.high
        if not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / self.quniform[2] if self.quniform else 0.0
        return math.isclose(steps, round(steps), abs_tol=1e-9)


_KINDS = ("uniform", "loguniform", "quniform", "randint", "lograndint", "choice")
_INTEGER_KINDS = ("randint", "lograndint")


class BudgetSpec(Spec):
    """Limits on the trials of a search, summed over all restarts.

    They do not apply to the training of the best trials after the search (see `promote`).
    """

    trials: PositiveInt = 40
    """Maximum number of trials; the first one uses the spec's own values."""
    hours: Positive | None = None
    """Maximum wall-clock hours. Default: no limit."""
    cpu_hours: Positive | None = None
    """Maximum CPU-hours reserved by trials (logical CPUs × hours). Default: no limit."""
    gpu_hours: Positive | None = None
    """Maximum GPU-hours reserved by trials (GPUs × hours). Default: no limit."""


class TuneSpec(Spec):
    """Hyperparameter search: search space, searcher, scheduler and budget."""

    space: dict[str, DistributionSpec] = Field(default_factory=dict)
    """Distribution of each setting to search, keyed by its dotted name, such as
    {train.learning_rate: {loguniform: [1e-5, 1e-2]}, train.weight_decay: {uniform: [0, 0.1], when:
    {train.optimizer: [adamw, lamb]}}}."""
    first: tuple[dict[str, Any], ...] = ()
    """Values to try first: a list with one mapping of setting to value per trial. These trials run
    right after the first trial, which uses the spec's own values. Settings that a mapping leaves
    out keep the spec's values."""
    metrics: tuple[Metric, ...] = ()
    """Metrics to optimize, taken from each trial's best epoch. With several metrics, such as
    val/log_loss,inference/row_s, the first one ranks the trials. `inference/row_s` is the time to
    predict one row, in seconds. Default: `train.monitor`."""
    searcher: Literal["tpe", "random", "grid", "cmaes", "nsga2"] = "tpe"
    """How values are chosen: by Optuna's tree-structured Parzen estimator (`tpe`), at random
    (`random`), from all combinations in order (`grid`), by CMA-ES (`cmaes`; numbers only) or by
    NSGA-II (`nsga2`; for several metrics)."""
    scheduler: Literal["asha", "hyperband", "median", "pbt", "pb2", "fifo"] = "asha"
    """How trials are stopped early: by asynchronous successive halving (`asha`), HyperBand, the
    median rule, or never (`fifo`). With `pbt` and `pb2`, the worst trials instead continue from the
    weights of the best ones, with changed settings."""
    grace_epochs: PositiveInt | None = None
    """Minimum epochs of a trial before `asha` or `median` may stop it. Default: a ninth of
    `train.epochs`."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """At each decision, `asha` and `hyperband` continue one in this many trials: with 3, the best
    third."""
    perturbation_epochs: PositiveInt | None = None
    """Epochs between two decisions of `pbt` and `pb2`. Default: a tenth of `train.epochs`."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Number of folds of the training and validation rows. Each trial then trains a model per fold,
    all of them epoch by epoch, and its score is the mean over the folds; the best trial is
    afterwards trained on the training split. Default: one model, scored on the validation
    split."""
    seed: NonNegativeInt = 0
    """Seed for the searcher."""
    workers_per_trial: PositiveInt | None = None
    """Worker processes per trial. Default: `train.num_workers`, or its minimum if it is a range."""
    gpus_per_worker: Positive | None = None
    """GPUs per worker, such as 0.25 for a small model. Default: `train.gpus_per_worker`."""
    max_concurrent_trials: PositiveInt | None = None
    """Maximum number of simultaneous trials. `hyperband`, `pbt` and `pb2` ignore it, except in one
    case: if the first trial fits only after the cluster adds nodes, and the cluster's maximum size
    is unknown, every scheduler requires this setting. Default: as many as fit on the cluster at its
    maximum size."""
    max_failures: NonNegativeInt = 2
    """How many times a trial may lose a process or node and resume from its checkpoint. An error in
    data or settings ends the trial at once, and the search continues."""
    checkpoint_every_s: Positive = 30.0
    """Minimum seconds between two checkpoints of a trial; checkpoints are written only at the end
    of an epoch."""
    feature_cache: Literal["auto", "always", "none"] = "auto"
    """Compute the features of the frozen image backbone once, so that trials train only the layers
    above it. `auto` does so if the backbone is frozen at least in the first stage; `always` does so
    in any case, as if the backbone were frozen."""
    feature_views: NonNegativeInt = 4
    """Number of augmented views of each training image in the feature cache, besides the
    original."""
    promote: PositiveInt = 4
    """If trials train on cached features: how many of the best trials are trained again after the
    search, on the images and from the start, to choose the best run among them."""
    budget: BudgetSpec = BudgetSpec()

    @model_validator(mode="after")
    def _require_supported_metrics(self) -> Self:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(
                f"metrics={','.join(self.metrics)} contains duplicates; list each metric once"
            )
        if len(self.metrics) > 1 and self.searcher == "cmaes":
            raise ValueError(
                "searcher=cmaes supports only one metric; use tpe, nsga2 or random, or give one "
                "metric"
            )
        return self

    @model_validator(mode="after")
    def _require_supported_space(self) -> Self:
        continuous = [path for path, values in self.space.items() if values.is_continuous]
        if self.searcher == "grid" and continuous:
            raise ValueError(
                f"searcher=grid cannot enumerate {', '.join(continuous)}; use choice, quniform or "
                "randint"
            )
        discrete = [path for path in self.space if path not in continuous]
        if self.scheduler == "pb2" and discrete:
            have = "has another distribution" if len(discrete) == 1 else "have other distributions"
            raise ValueError(
                "scheduler=pb2 supports only uniform and loguniform, but "
                f"{', '.join(discrete)} {have}; use pbt"
            )
        if self.scheduler in EXPLOITING and len(self.metrics) > 1:
            raise ValueError(
                f"scheduler={self.scheduler} supports only one metric; use asha, or give one metric"
            )
        if self.scheduler in EXPLOITING and self.metrics == ("inference/row_s",):
            raise ValueError(
                f"scheduler={self.scheduler} needs a metric that improves during training, but "
                "inference/row_s does not; choose a validation metric"
            )
        return self
