"""Defines the settings of the jobs once, for YAML schema, flags, `--help` and search space.

The sections `model`, `prepare` and `tune` have modules of their own. Precedence: default < YAML <
flag. Imports neither Ray nor TensorFlow.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from mm_model.spec import LossSpec, ModelSpec, OptimizerSpec, Positive, Spec, StageSpec
from ray_jobs.config.command_line import validate_spec, with_value
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.tune_spec import TuneSpec

MAX_STREAMS = 64


def num_streams(global_batch_size: int) -> int:
    """Return the number of sampler streams: the largest divisor of the global batch up to 64.

    Each step takes the same number of rows from every stream, and every worker serves the same
    number of streams, so the order of rows does not depend on the number of workers.
    """
    return max(n for n in range(1, MAX_STREAMS + 1) if global_batch_size % n == 0)


class RunSection(Spec):
    """The run folder and the Ray cluster."""

    storage_path: str = "runs"
    """Folder or URI in which the run folder is created; every node must be able to write to it."""
    name: str | None = None
    """Name of the run folder; an existing name resumes that run. Default: date and time."""
    address: str | None = None
    """Address of a Ray cluster, such as `auto`. Default: $RAY_ADDRESS, else a new local Ray
    instance."""
    seed: NonNegativeInt = 0
    """Seed for splits, row order, initial weights, dropout and augmentation."""
    worker_logs: bool = False
    """Print the workers' log output, not only their progress and errors."""
    preflight: bool = True
    """Run the fast checks of `doctor` on every node before work starts, if the cluster has
    nodes other than this one."""
    tracking: Literal["none", "mlflow"] = "none"
    """Also log parameters, metrics and the model to MLflow, which needs the extra `mlflow`."""
    tracking_uri: str | None = None
    """MLflow server or store. Default: $MLFLOW_TRACKING_URI, else an SQLite file in the storage
    path."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step that rank 0 profiles for TensorBoard, such as 10,13."""

    @field_validator("profile_steps")
    @classmethod
    def _require_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(
                f"the first step {value[0]} is after the last step {value[1]}; swap the two numbers"
            )
        return value

    @field_validator("name")
    @classmethod
    def _require_folder_name(cls, value: str | None) -> str | None:
        if value is not None and (not value or "/" in value or value.startswith(".")):
            raise ValueError("must be one folder name, without slashes and without a leading dot")
        return value


class DataSpec(Spec):
    """How prepared rows reach the workers."""

    prepared: str = "prepared"
    """Folder or URI that `prepare` wrote."""
    categorical: tuple[str, ...] = ()
    """Text columns to use as categorical inputs: `prepare` stores them and builds a vocabulary from
    the training split, and the model embeds them."""
    text: tuple[str, ...] = ()
    """Columns of free text, such as notes, to use as inputs; `prepare` stores them."""
    text_length: PositiveInt = 64
    """Maximum number of tokens of a text; the rest of longer texts is cut off."""
    image_size: PositiveInt | None = None
    """Side length in pixels of the model's input images. Default: as stored."""
    shuffle_window_rows: PositiveInt = 2048
    """Number of rows in a shuffle window. Each epoch shuffles the row groups, divides their rows
    into windows, and shuffles the rows within each window. `buffer_bytes` may reduce the number."""
    buffer_bytes: PositiveInt = 1 << 30
    """Limit in bytes, summed over all workers, for the stored (not yet decoded) rows that are in
    memory for shuffling and prefetching."""
    decode: Literal["auto", "workers", "trainer"] = "auto"
    """Where images are decoded: in threads of the training processes (`trainer`), or in Ray Data
    tasks (`workers`), which are separate processes and can also run on nodes without GPUs. `auto`
    chooses `workers` if `train.use_gpu` is set, some nodes (or nodes that an autoscaler can add)
    have no GPU, and `cache` is `auto` or `none`."""
    cache: Literal["auto", "none", "object_store", "disk"] = "auto"
    """Where decoded rows are kept between epochs: in Ray's object store, or on the disks of the
    nodes. `auto` caches only if the training and validation splits fit in `cache_bytes` completely.
    It then uses the object store if the splits fill at most half of that store, else the disks."""
    cache_bytes: NonNegativeInt = 1 << 30
    """Limit in bytes for cached decoded rows; the remaining rows are decoded in each epoch."""
    object_store_memory: PositiveInt | None = None
    """Size in bytes of the object store if the job starts a local Ray instance. On an existing
    cluster: maximum number of bytes of the object store that the job's Ray Data tasks may use.
    Default: Ray's own limits if tasks decode, otherwise `buffer_bytes`; a local object store gets
    30 % of memory."""
    prefetch_batches: NonNegativeInt = 2
    """Number of device batches that each worker prepares in advance; each has the rows of up to
    `train.steps_per_call` steps. 0 disables prefetching in the trainer."""

    @model_validator(mode="after")
    def _require_decoding_for_cache(self) -> Self:
        if self.decode == "workers" and self.cache not in ("auto", "none"):
            raise ValueError(
                f"cache={self.cache} stores rows that training processes decode, but "
                "decode=workers decodes in tasks; set decode=trainer or cache=none"
            )
        return self

    def window_rows(self, row_bytes: float) -> int:
        """Return the number of rows in a shuffle window.

        Args:
            row_bytes: Average size of a stored row in bytes.
        """
        # Two windows are in memory at a time, one being decoded and one being read. Each keeps its
        # first and last row group in full, which can double its size.
        return max(1, min(self.shuffle_window_rows, int(self.buffer_bytes / (4 * row_bytes))))


class TrainSpec(LossSpec, OptimizerSpec):
    """The training loop and its workers."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of worker processes. Two numbers such as 2,8 give a minimum and a maximum: the run
    then uses as many workers as the cluster has resources for, and chooses the number again at each
    start and whenever the cluster grows. It requests nodes for the maximum from an autoscaler."""
    wait_for_workers_s: NonNegativeFloat = 60.0
    """Seconds that a run with a minimum and a maximum of `num_workers` waits at its start for nodes
    for the maximum; then it starts with the workers that fit."""
    use_gpu: bool = False
    """Whether workers use GPUs."""
    gpus_per_worker: PositiveInt = 1
    """GPUs per worker; each GPU holds its own replica."""
    cpus_per_worker: Positive = 1.0
    """Logical CPUs per worker; also the number of compute threads of each worker."""
    resources_per_worker: dict[str, Positive] = Field(default_factory=dict)
    """Additional Ray resources per worker, such as {"accelerator_type:A10G": 0.001}."""
    global_batch_size: PositiveInt = 32
    """Rows per optimizer step, over all workers."""
    epochs: PositiveInt = 50
    """Maximum number of passes over the training rows."""
    stages: tuple[StageSpec, ...] = ()
    """Layer-freezing schedule: a list of stages. For example, [{epochs: 3, backbone: 0},
    {epochs: 5, backbone: 0.3, backbone_rate: 0.1}] freezes the backbone for three epochs, then
    trains the top 30 % of its layers at a tenth of the learning rate."""
    class_weight: Literal["balanced", "none"] = "balanced"
    """`balanced` weights rows so that both classes contribute equally, based on the class counts of
    the training split."""
    monitor: Literal["val/log_loss", "val/roc_auc", "val/pr_auc"] = "val/log_loss"
    """Validation metric that selects the best epoch."""
    patience: PositiveInt = 10
    """Epochs without improvement after which training stops."""
    clip_norm: Positive | None = None
    """Maximum global norm of a step's gradient, over all workers; `none` disables clipping."""
    accumulate_steps: PositiveInt = 1
    """Number of micro-batches into which each replica splits its rows of a step; a higher number
    needs less memory."""
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Compute precision of the layers; weights stay float32. mixed_float16 also uses loss
    scaling."""
    jit_compile: bool = False
    """Compile the forward and backward pass with XLA."""
    steps_per_call: PositiveInt = 1
    """Training steps per TensorFlow call; a higher number reduces the overhead of short steps."""
    all_reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which workers exchange gradients."""
    all_reduce_bytes: PositiveInt | None = None
    """Maximum size in bytes of one gradient exchange. Default: all gradients at once."""
    deterministic: bool = False
    """Use deterministic operations, which are slower but make GPU results bitwise reproducible."""
    checkpoint_every_steps: PositiveInt | None = None
    """Maximum number of steps that a failure can lose. Because training continues while a
    checkpoint is written, one is started after three quarters of this number of steps. Default:
    checkpoints are written only at the end of each epoch."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints to keep; if one is damaged, the one before it is used."""
    keep_best: PositiveInt = 1
    """Number of epochs whose weights are kept: the best ones by `monitor`."""
    calibrate: bool = True
    """After training, fit the blending weights of the heads, and a scale and bias for the logit, on
    the validation split."""
    decision_threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["f1", "balanced_accuracy"] = (
        0.5
    )
    """Probability at or above which a row is classified as positive, or the validation metric that
    the threshold should maximize."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Maximum number of failures to recover from; -1 means no limit. Errors in data or settings are
    not retried."""
    max_preemptions: Annotated[int, Field(ge=-1)] = -1
    """Maximum number of node preemptions to recover from; -1 means no limit."""
    hang_timeout_s: Positive = 900.0
    """Seconds without a completed step before a worker is considered hung; must exceed the time for
    start-up and the first step."""

    @model_validator(mode="after")
    def _require_divisible_batch(self) -> Self:
        allowed, (low, high) = self.allowed_workers(), self.workers_range
        if low > high:
            raise ValueError(
                f"num_workers={low},{high}: the minimum exceeds the maximum; swap the two numbers"
            )
        if not allowed:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} cannot be split into "
                f"accumulate_steps={self.accumulate_steps} parts for each of "
                f"{self.replicas_per_worker} replicas; change global_batch_size or "
                "accumulate_steps"
            )
        if not [n for n in allowed if low <= n <= high]:
            workers = low if low == high else f"{low},{high}"
            accepted = " or ".join(", ".join(map(str, allowed)).rsplit(", ", 1))
            raise ValueError(
                f"global_batch_size={self.global_batch_size} cannot be divided equally among "
                f"num_workers={workers}; use num_workers={accepted}"
            )
        return self

    @model_validator(mode="after")
    def _require_reachable_stages(self) -> Self:
        before = sum(stage.epochs for stage in self.stages[:-1])
        if before >= self.epochs:
            raise ValueError(
                f"stages: the last stage starts after epoch {before}, but training ends after "
                f"epochs={self.epochs}; increase epochs or shorten the stages"
            )
        return self

    @property
    def workers_range(self) -> tuple[int, int]:
        """Minimum and maximum number of workers."""
        given = self.num_workers
        return (given, given) if isinstance(given, int) else given

    @property
    def replicas_per_worker(self) -> int:
        """Replicas of the model in one worker."""
        return self.gpus_per_worker if self.use_gpu else 1

    @property
    def checkpoint_cadence(self) -> int | None:
        """Steps between two checkpoints: three quarters of `checkpoint_every_steps`.

        Training continues while a checkpoint is written, so a failure can lose more than that.
        """
        every = self.checkpoint_every_steps
        return None if every is None else every - every // 4

    def allowed_workers(self) -> list[int]:
        """Return, in order, the numbers of workers among which the global batch divides equally."""
        streams = num_streams(self.global_batch_size)
        parts = self.replicas_per_worker * self.accumulate_steps
        return [
            n
            for n in range(1, streams + 1)
            if streams % n == 0 and self.global_batch_size // n % parts == 0
        ]


class CvSpec(Spec):
    """Cross-validation over the training and validation rows."""

    folds: Annotated[int, Field(ge=2)] | None = None
    """Number of folds. Default: those of `prepare.fold_column`, else 5."""
    repeats: PositiveInt = 1
    """How many times to divide the rows into folds, differently each time."""
    export: Literal["none", "mean"] = "none"
    """`mean` also saves a model that averages the calibrated probabilities of all folds' models,
    and evaluates it on the test split."""


class RunSpec(Spec):
    """All settings of a run, from one YAML file or flags."""

    run: RunSection = RunSection()
    prepare: PrepareSpec = PrepareSpec()
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    tune: TuneSpec = TuneSpec()
    cv: CvSpec = CvSpec()

    @model_validator(mode="after")
    def _require_compilable_batch_norm(self) -> Self:
        train = self.train
        max_replicas = train.workers_range[1] * train.replicas_per_worker
        if train.jit_compile and self.model.batch_norm == "sync" and max_replicas > 1:
            raise ValueError(
                "train.jit_compile=true cannot compile the exchange of statistics between replicas "
                "that model.batch_norm=sync needs; set batch_norm=local or jit_compile=false"
            )
        return self

    def overlay(self, changes: dict[str, Any]) -> Self:
        """Return a copy with settings replaced by path, such as {"train.learning_rate": 1e-3}.

        Raises:
            UsageError: If a path is unknown or a value is invalid.
        """
        tree = self.model_dump(mode="json")
        for path, value in changes.items():
            tree = with_value(tree, path, value)
        return validate_spec(type(self), tree)


class CrossValidateSpec(RunSpec):
    """Settings of `cross_validate`: those of a run, and further specs to compare it with."""

    compare: tuple[str, ...] = ()
    """YAML files of further specs, such as `a.yaml,b.yaml`: their models are trained on the same
    folds and compared with those of the first spec."""


class InspectSpec(Spec):
    """Data-quality report on prepared data."""

    POSITIONAL: ClassVar[str] = "prepared"

    prepared: str
    """Folder or URI that `prepare` wrote."""
    output: str | None = None
    """Folder or URI for inspect.html and inspect.json. Default: the prepared folder."""
    max_rows: PositiveInt = 1_000_000
    """Maximum rows to inspect per split; a larger split is sampled by a hash of the key."""


class DemoSpec(Spec):
    """The whole pipeline on generated data: prepare, train, evaluate, predict."""

    output: str = "demo"
    """Folder for data and runs; an earlier demo in it is replaced."""
    num_rows: Annotated[int, Field(ge=100)] = 1200
    """Number of rows to generate."""
    epochs: PositiveInt = 15
    """Maximum number of epochs of each of the four training runs."""
    num_workers: PositiveInt = 2
    """Number of workers that train the fusion model."""
    seed: NonNegativeInt = 0
    """Seed for data and training."""
