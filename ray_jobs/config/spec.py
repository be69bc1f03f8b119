"""Every setting of the jobs, defined once: YAML schema, flags, `--help` and search space.

Precedence: default < YAML < flag. Imports neither Ray nor TensorFlow.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from mm_model.spec import LossSpec, ModelSpec, OptimizerSpec, Positive, Spec, StageSpec
from ray_jobs.config.command_line import validate_spec, with_value
from ray_jobs.config.tune_spec import TuneSpec

Split = Literal["train", "validation", "test"]
NumberRule = Literal["range_low", "range_mean", "range_high", "decimal_comma", "date", "missing"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
MAX_STREAMS = 64


def num_streams(global_batch_size: int) -> int:
    """Return the number of sampler streams: the largest divisor of the global batch up to 64.

    Each step takes the same number of rows from every stream, and the workers share the streams
    equally, so the order of rows does not depend on the number of workers.
    """
    return max(n for n in range(1, MAX_STREAMS + 1) if global_batch_size % n == 0)


class RunSection(Spec):
    """The run folder and the Ray cluster."""

    storage_path: str = "runs"
    """Folder or URI that every node can write to; the run folder is created in it."""
    name: str | None = None
    """Name of the run folder; an existing name resumes that run. Default: date and time."""
    address: str | None = None
    """Address of a Ray cluster, such as `auto`. Default: $RAY_ADDRESS, else a new local Ray."""
    seed: NonNegativeInt = 0
    """Seed of splits, row order, initial weights, dropout and augmentation."""
    worker_logs: bool = False
    """Print the workers' log output, not only their progress and errors."""
    preflight: bool = True
    """Run the fast checks of `doctor` on every node before work starts, if the cluster has nodes
    other than this one."""
    tracking: Literal["none", "mlflow"] = "none"
    """Also log parameters, metrics and the model to MLflow, which needs the extra `mlflow`."""
    tracking_uri: str | None = None
    """MLflow server or store. Default: $MLFLOW_TRACKING_URI, else SQLite in the storage path."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step that rank 0 profiles for TensorBoard, such as 10,13."""

    @field_validator("profile_steps")
    @classmethod
    def _require_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"the first step {value[0]} is after the last step {value[1]}")
        return value

    @field_validator("name")
    @classmethod
    def _require_folder_name(cls, value: str | None) -> str | None:
        if value is not None and (not value or "/" in value or value.startswith(".")):
            raise ValueError("must be one folder name, without slashes and without a leading dot")
        return value


class PrepareSpec(Spec):
    """Conversion of images and a table into shards with a manifest."""

    source: Literal["auto", "folder", "parquet", "webdataset", "tfrecord", "imagefolder"] = "auto"
    """Format of `images`: image files, Parquet with an image column, WebDataset tar files, TFRecord
    files of `tf.train.Example`, or a Hugging Face ImageFolder; `auto` detects it."""
    images: str = ""
    """Folder, glob or URI of the images, or of the files that contain them."""
    table: str = ""
    """CSV or Parquet file (path or URI) with the columns; empty if `images` contains them, too."""
    output: str = "prepared"
    """Folder or URI for the prepared data; every worker reads it from there."""
    key_column: str = "key"
    """Column with the unique name of each row."""
    label_column: str = "label"
    """Column with the label: 0/1, booleans, or two strings."""
    positive_label: str | None = None
    """Which of two label strings is the positive class."""
    image_pattern: str = "{key}.jpg"
    """Image path relative to `images`, with column names in braces; `{key}` is the key column."""
    image_column: str | None = None
    """Column with the image path relative to `images`, instead of the pattern; for Parquet and
    TFRecord files, the column with the image itself."""
    image_columns: tuple[str, ...] = ()
    """Names of the images of a row if it has several: columns like `image_column`, or values of
    `{image}` in the pattern. The model uses all of them; some may be missing."""
    numeric_columns: tuple[str, ...] | None = None
    """Numeric input columns. Default: every numeric column without another role."""
    number_rules: dict[str, NumberRule] = Field(default_factory=dict)
    """How to read text in a numeric column, such as {age: range_mean}. The range rules read `91-92`
    and `50+` as their low end, mean or high end; `decimal_comma` reads `1.234,5`; `date` gives days
    since 1970; `missing` treats all other text as missing. Without a rule, rows with such text go
    to quarantine."""
    exclude_columns: tuple[str, ...] = ()
    """Columns that are never inputs."""
    skip_unlabelled: bool = False
    """Skip rows without a label instead of counting them as bad rows."""
    group_column: str | None = None
    """Column whose equal values (such as a patient or a house) keep rows in the same split."""
    split_column: str | None = None
    """Column with train, validation or test for each row, used instead of the split by hash."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of each class for the validation split: early stopping, blending and calibration."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of each class for the test split."""
    store: Literal["jpeg", "raw"] = "jpeg"
    """Storage format of images: JPEG, or raw pixels, which are larger but need no decoding."""
    image_size: PositiveInt = 456
    """Side length of stored images in pixels, and of the model's input without data.image_size."""
    aspect: Literal["stretch", "crop", "pad"] = "stretch"
    """How images become square: stretched, cropped to the center, or padded with black."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """JPEG quality of stored images."""
    max_image_pixels: PositiveInt = 100_000_000
    """Images with more pixels are rejected before decoding."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The job fails if a larger share of the rows goes to quarantine."""
    rows_per_shard: PositiveInt = 1024
    """Rows per Parquet file; fewer for large raw images."""
    rows_per_group: PositiveInt = 64
    """Rows per Parquet row group, the smallest unit that is read; fewer for large raw images."""

    @model_validator(mode="after")
    def _require_training_rows(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction="
                f"{self.test_fraction} leave no rows for training; their sum must be below 1"
            )
        return self


class DataSpec(Spec):
    """How prepared rows reach the workers."""

    prepared: str = "prepared"
    """Folder or URI that `prepare` wrote."""
    categorical: tuple[str, ...] = ()
    """Text columns to use as categorical inputs: `prepare` stores them and builds a vocabulary from
    the training split, and the model embeds them."""
    image_size: PositiveInt | None = None
    """Side length in pixels of the model's input images. Default: as stored."""
    shuffle_window_rows: PositiveInt = 2048
    """Rows shuffled together, after a shuffle of row groups; fewer if limited by buffer_bytes."""
    buffer_bytes: PositiveInt = 1 << 30
    """Bytes of stored (encoded) rows that all workers together hold for shuffling and prefetch."""
    decode: Literal["auto", "workers", "trainer"] = "auto"
    """Where images are decoded: `trainer` uses threads of the training processes, `workers` uses
    Ray Data tasks, also on nodes without GPUs. `auto` uses tasks if there are such nodes."""
    cache: Literal["auto", "none", "object_store", "disk"] = "auto"
    """Where decoded rows are kept between epochs: in Ray's shared memory, or on the disks of the
    nodes. `auto` caches if the whole training and validation splits fit in `cache_bytes`."""
    cache_bytes: NonNegativeInt = 1 << 30
    """Limit in bytes for cached decoded rows; the remaining rows are decoded in each epoch."""
    object_store_memory: PositiveInt | None = None
    """Bytes of Ray's shared memory: the size in a local Ray that the job starts, and the most that
    its rows use on a cluster. Default: Ray's own, 30 % of the memory."""
    prefetch_batches: NonNegativeInt = 2
    """Batches that each worker prepares in advance; the next one is already on its device."""

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
        # One window is decoded while the next one is read, and each holds its first and last row
        # groups whole, which can double its size.
        return max(1, min(self.shuffle_window_rows, int(self.buffer_bytes / (4 * row_bytes))))


class TrainSpec(LossSpec, OptimizerSpec):
    """The training loop and its workers."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Worker processes, each with a replica of the model. Two numbers such as 2,8 are a minimum and
    a maximum: as many as the cluster has resources for, at each start and whenever it grows."""
    use_gpu: bool = False
    """Whether workers use GPUs."""
    gpus_per_worker: PositiveInt = 1
    """GPUs of each worker, each with its own replica."""
    cpus_per_worker: Positive = 1.0
    """Logical CPUs, and so compute threads, of each worker."""
    resources_per_worker: dict[str, Positive] = Field(default_factory=dict)
    """Additional Ray resources of each worker, such as {"accelerator_type:A10G": 0.001}."""
    global_batch_size: PositiveInt = 32
    """Rows per optimizer step, over all workers."""
    epochs: PositiveInt = 50
    """Maximum number of passes over the training rows."""
    stages: tuple[StageSpec, ...] = ()
    """Layer freezing schedule: the stages in order, such as [{epochs: 3, backbone: 0}, {epochs: 5,
    backbone: 0.3, backbone_rate: 0.1}], which first trains the heads with a frozen backbone."""
    class_weight: Literal["balanced", "none"] = "balanced"
    """`balanced` weights rows so that both classes contribute equally, by the training counts."""
    monitor: Literal["val/log_loss", "val/roc_auc", "val/pr_auc"] = "val/log_loss"
    """Validation metric that selects the best epoch."""
    patience: PositiveInt = 10
    """Epochs without improvement after which training stops."""
    clip_norm: Positive | None = None
    """Maximum global norm of a step's gradient, over all workers; none disables clipping."""
    accumulate_steps: PositiveInt = 1
    """Parts in which each replica computes its rows of a step; more parts need less memory."""
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Compute precision of the layers; weights stay float32. mixed_float16 scales the loss."""
    jit_compile: bool = False
    """Compile the forward and backward pass with XLA."""
    steps_per_call: PositiveInt = 1
    """Training steps per TensorFlow call; a higher number reduces the overhead of short steps."""
    all_reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type in which workers exchange gradients."""
    all_reduce_bytes: PositiveInt | None = None
    """Maximum size in bytes of one gradient exchange. Default: all gradients at once."""
    deterministic: bool = False
    """Use deterministic operations, which make GPU results reproducible bit by bit; slower."""
    checkpoint_every_steps: PositiveInt | None = None
    """Maximum number of steps that a failure can lose; checkpoints are written a little more often.
    Default: checkpoints are written only at the end of each epoch."""
    keep_checkpoints: PositiveInt = 2
    """Number of latest checkpoints to keep; if one is damaged, the one before it is used."""
    keep_best: PositiveInt = 1
    """Number of best epochs whose weights are kept."""
    calibrate: bool = True
    """Fit the blend and the scale and bias of the logit on the validation split after training."""
    decision_threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["f1", "balanced_accuracy"] = (
        0.5
    )
    """Probability from which a row is positive, or the validation metric that selects it."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Failures to recover from; -1: no limit. Errors in data or settings are not retried."""
    max_preemptions: Annotated[int, Field(ge=-1)] = -1
    """Node preemptions to recover from; -1: no limit."""
    hang_timeout_s: Positive = 900.0
    """Seconds without a completed step after which a worker has failed; must exceed the time for
    start-up and the first step."""

    @model_validator(mode="after")
    def _require_equal_shares(self) -> Self:
        allowed, (low, high) = self.allowed_workers(), self.workers_range
        if low > high:
            raise ValueError(f"num_workers={low},{high}: the minimum exceeds the maximum")
        if not allowed:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} cannot be split into "
                f"accumulate_steps={self.accumulate_steps} parts for each of "
                f"{self.replicas_per_worker} replicas"
            )
        if not [n for n in allowed if low <= n <= high]:
            workers = low if low == high else f"{low},{high}"
            raise ValueError(
                f"num_workers={workers} cannot share global_batch_size={self.global_batch_size} "
                f"equally (accepted: {', '.join(map(str, allowed))})"
            )
        return self

    @model_validator(mode="after")
    def _require_reachable_stages(self) -> Self:
        before = sum(stage.epochs for stage in self.stages[:-1])
        if before >= self.epochs:
            raise ValueError(
                f"stages: the last stage starts after epoch {before}, which epochs={self.epochs} "
                "does not reach; increase epochs or shorten the stages"
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
        """Steps between two checkpoints: a quarter less than may be lost, to allow for writing."""
        every = self.checkpoint_every_steps
        return None if every is None else every - every // 4

    def allowed_workers(self) -> list[int]:
        """Return, in order, the numbers of workers that can share the global batch equally."""
        streams = num_streams(self.global_batch_size)
        parts = self.replicas_per_worker * self.accumulate_steps
        return [
            n
            for n in range(1, streams + 1)
            if streams % n == 0 and self.global_batch_size // n % parts == 0
        ]


class RunSpec(Spec):
    """All settings of a run, from one YAML file or flags."""

    run: RunSection = RunSection()
    prepare: PrepareSpec = PrepareSpec()
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    tune: TuneSpec = TuneSpec()

    @model_validator(mode="after")
    def _require_compilable_batch_norm(self) -> Self:
        train = self.train
        max_replicas = train.workers_range[1] * train.replicas_per_worker
        if train.jit_compile and self.model.batch_norm == "sync" and max_replicas > 1:
            raise ValueError(
                "train.jit_compile=true cannot compile the exchange between replicas of "
                "model.batch_norm=sync; set batch_norm=local or jit_compile=false"
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


class InferenceSpec(Spec):
    """Settings that `evaluate` and `predict` share."""

    run: str
    """Run folder that `train` wrote."""
    data: str
    """Folder or URI of prepared data; `predict` also accepts a table of raw rows."""
    output: str
    """Folder or URI for the results."""
    batch_size: PositiveInt = 64
    """Rows per model call."""
    num_workers: PositiveInt = 1
    """Number of processes, each with its own copy of the model."""
    use_gpu: bool = False
    """Whether each process uses a GPU."""
    cpus_per_worker: Positive = 1.0
    """Logical CPUs of each process."""
    address: str | None = None
    """Address of a Ray cluster, such as `auto`. Default: $RAY_ADDRESS, else a new local Ray."""
    worker_logs: bool = False
    """Print the workers' log output."""


class EvaluateSpec(InferenceSpec):
    """Metrics and plots of a run on one split."""

    split: Split = "test"
    """Split to evaluate."""


class PredictSpec(InferenceSpec):
    """Probabilities of a run for prepared or raw rows."""

    split: Split | None = None
    """Split of prepared data to predict. Default: all splits."""
    images: str | None = None
    """For raw rows: path or URI of each image with column names in braces, such as
    `photos/{key}.jpg`, or the folder to which the run's own pattern is relative."""


class InspectSpec(Spec):
    """Data-quality report on prepared data."""

    POSITIONAL: ClassVar[str] = "prepared"

    prepared: str
    """Folder or URI that `prepare` wrote."""
    output: str | None = None
    """Folder or URI for inspect.html and inspect.json. Default: the prepared folder."""
    max_rows: PositiveInt = 1_000_000
    """Rows to inspect per split; a larger split is sampled by a hash of the key."""


class DemoSpec(Spec):
    """The whole pipeline on generated data: prepare, train, evaluate, predict."""

    output: str = "demo"
    """Folder for data and runs; an earlier demo in it is replaced."""
    num_rows: Annotated[int, Field(ge=100)] = 1200
    """Rows to generate."""
    epochs: PositiveInt = 15
    """Maximum number of epochs of each of the three trainings."""
    num_workers: PositiveInt = 2
    """Workers that train the fusion model."""
    seed: NonNegativeInt = 0
    """Seed of data and training."""
