"""Every setting of the jobs, written once: YAML schema, flags, `--help` and search space.

Precedence: default here < YAML < flag.  Imports neither Ray nor TensorFlow.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from mm_model.spec import Fraction, LossSpec, ModelSpec, OptimizerSpec, Positive, Spec, StageSpec
from ray_jobs.config.tune_spec import TuneSpec
from ray_jobs.data.batch import num_streams

Split = Literal["train", "validation", "test"]
NumberRule = Literal["range_low", "range_mean", "range_high", "decimal_comma", "date", "missing"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class RunSection(Spec):
    """Where the run lives, and which cluster does the work."""

    storage_path: str = "runs"
    """Folder or URI that every node can write; the run folder is made in it."""
    name: str | None = None
    """Name of the run folder; the same name again resumes. By default date and time."""
    address: str | None = None
    """Ray cluster, such as `auto`; by default $RAY_ADDRESS, else a local Ray is started for this
    job."""
    seed: NonNegativeInt = 0
    """Seed of the splits, the order of rows, the weights' start, dropout and augmentation."""
    worker_logs: bool = False
    """Print what workers write to their logs, not only their progress and their errors."""
    preflight: bool = True
    """Look at versions, storage, data and weights on every node before work starts, where the
    cluster has other nodes than this one: what `doctor` does, less what takes long."""
    tracking: Literal["none", "mlflow"] = "none"
    """Where parameters, metrics and the model go, beside the run folder; MLflow needs the extra
    `mlflow`."""
    tracking_uri: str | None = None
    """MLflow's server or store; by default $MLFLOW_TRACKING_URI, else a SQLite file beside the
    runs."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step of which rank 0 writes a trace for TensorBoard's profiler, such as
    10,13."""

    @field_validator("profile_steps")
    @classmethod
    def _first_before_last(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"the first step {value[0]} comes after the last {value[1]}")
        return value

    @field_validator("name")
    @classmethod
    def _one_path_part(cls, value: str | None) -> str | None:
        if value is not None and (not value or "/" in value or value.startswith(".")):
            raise ValueError("a run's name is one folder name: no slash, no dot in front")
        return value


class PrepareSpec(Spec):
    """Raw images and a table in, shards and a manifest out."""

    source: Literal["auto", "folder", "parquet", "webdataset", "tfrecord", "imagefolder"] = "auto"
    """What `images` is: image files, Parquet with images in a column, WebDataset tar files,
    TFRecord files of `tf.train.Example`, or Hugging Face's ImageFolder; auto tells by its files."""
    images: str = ""
    """Folder, glob or URI of the images, or of the files that hold them."""
    table: str = ""
    """CSV or Parquet file with one row a thing: path or URI. Empty where the files in `images`
    hold the numbers, too."""
    output: str = "prepared"
    """Folder or URI for the prepared data; every worker reads it from there."""
    key_column: str = "key"
    """Column that names each row, once."""
    label_column: str = "label"
    """Column with the answer: 0/1, booleans, or two strings."""
    positive_label: str | None = None
    """Which of two strings counts as 1."""
    image_pattern: str = "{key}.jpg"
    """Path of a row's image below `images`, with columns in braces; `{key}` is the key column."""
    image_column: str | None = None
    """Column with the path of the image below `images`, in place of the pattern; of Parquet and
    TFRecord files the column that holds the image."""
    image_columns: tuple[str, ...] = ()
    """Several images a row, by name: columns of the same kind, or words that `{image}` in the
    pattern stands for. The model looks at all of them; some may be missing."""
    numeric_columns: tuple[str, ...] | None = None
    """Columns to learn from; by default every column of numbers that has no other role."""
    number_rules: dict[str, NumberRule] = Field(default_factory=dict)
    """What text in a numeric column means, such as {age: range_mean}: the low end, mean or high end
    of `91-92` and `50+`; a decimal comma; a date, as days since 1970; or missing. Without a rule
    such a row goes to quarantine."""
    exclude_columns: tuple[str, ...] = ()
    """Columns never to learn from."""
    skip_unlabelled: bool = False
    """Set rows without a label aside without counting them as bad."""
    group_column: str | None = None
    """Rows with the same value here (a patient, a house) stay in one split."""
    split_column: str | None = None
    """Column that already says train, validation or test, in place of the split by hash."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of each class for validation: early stopping, blend, calibration."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of each class for the final test."""
    store: Literal["jpeg", "raw"] = "jpeg"
    """How images are stored: as JPEG, or as pixels, which take more bytes and no decoding."""
    image_size: PositiveInt = 456
    """Side of the stored images in pixels; the model takes them at this size, or at
    `data.image_size`."""
    aspect: Literal["stretch", "crop", "pad"] = "stretch"
    """How other shapes become squares: stretched, cut to the centre, or padded with black."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of the stored JPEGs."""
    max_image_pixels: PositiveInt = 100_000_000
    """Larger images are refused before they are decoded."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The job fails if a larger share of the rows lands in quarantine."""
    rows_per_shard: PositiveInt = 1024
    """Rows of one Parquet file; fewer where pixels are stored raw and are many."""
    rows_per_group: PositiveInt = 64
    """Rows of one Parquet row group, the least that is read at once; fewer likewise."""

    @model_validator(mode="after")
    def _some_rows_left_to_train(self) -> Self:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and "
                f"test_fraction={self.test_fraction} leave nothing to train on"
            )
        return self


class DataSpec(Spec):
    """How prepared rows reach the workers."""

    prepared: str = "prepared"
    """Folder or URI that `prepare` wrote."""
    categorical: tuple[str, ...] = ()
    """Columns of words to learn from: `prepare` stores them and fits a vocabulary on the training
    split, the model embeds them."""
    image_size: PositiveInt | None = None
    """Side in pixels at which the model takes images; by default as they are stored."""
    shuffle_window_rows: PositiveInt = 2048
    """Rows that are shuffled together, beyond the shuffle of row groups; fewer where they would
    not fit in `buffer_bytes`."""
    buffer_bytes: PositiveInt = 1 << 30
    """Bytes of stored rows, encoded, that all workers together hold while they shuffle and read
    ahead."""
    decode: Literal["auto", "workers", "trainer"] = "auto"
    """Where images are decoded: in threads of the training processes, or in Ray Data tasks, also on
    nodes without GPUs; auto takes those tasks where there are such nodes."""
    cache: Literal["auto", "none", "object_store", "disk"] = "auto"
    """Where decoded rows are kept across epochs: in Ray's shared memory, or on the nodes' disks;
    auto keeps them where all of training and validation fit in `cache_bytes`."""
    cache_bytes: NonNegativeInt = 1 << 30
    """Most bytes of decoded rows that are kept; the rest is decoded anew each epoch."""
    object_store_memory: PositiveInt | None = None
    """Bytes of Ray's shared memory: of the local Ray that the job starts, and on a cluster the most
    that its rows take; by default Ray's own share, 30 % of the memory."""
    prefetch_batches: NonNegativeInt = 2
    """Batches that are made ready ahead of the step, on each worker, the next one on its device."""

    @model_validator(mode="after")
    def _cache_where_rows_are_decoded(self) -> Self:
        if self.decode == "workers" and self.cache not in ("auto", "none"):
            raise ValueError(
                f"cache={self.cache} keeps what the training processes decode, and decode=workers "
                "leaves that to tasks; set decode=trainer, or cache=none"
            )
        return self

    def window_rows(self, row_bytes: float) -> int:
        """Return the rows of a shuffle window.

        Args:
            row_bytes: of a stored row, on the average.
        """
        # One window is decoded while the next is read, and both hold the row groups whole that
        # they begin and end in, which can double them.
        return max(1, min(self.shuffle_window_rows, int(self.buffer_bytes / (4 * row_bytes))))


class TrainSpec(LossSpec, OptimizerSpec):
    """The training loop and its workers."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Worker processes, each with its own replica of the model; or the least and the most of them,
    such as 2,8: as many as the cluster has room for, at every start and whenever it grows."""
    use_gpu: bool = False
    """Give each worker GPUs."""
    gpus_per_worker: PositiveInt = 1
    """GPUs of each worker, each with a replica of its own."""
    cpus_per_worker: Positive = 1.0
    """Logical CPUs of each worker; it computes with as many threads."""
    resources_per_worker: dict[str, Positive] = Field(default_factory=dict)
    """Further Ray resources of each worker, such as {"accelerator_type:A10G": 0.001}."""
    global_batch_size: PositiveInt = 32
    """Rows per optimizer step, summed over all workers."""
    epochs: PositiveInt = 50
    """Most passes over the training rows."""
    stages: tuple[StageSpec, ...] = ()
    """Freeze the backbone, train the heads, unfreeze it step by step: the stages in order, such as
    [{epochs: 3, backbone: 0}, {epochs: 5, backbone: 0.3, backbone_rate: 0.1}]."""
    class_weight: Literal["balanced", "none"] = "balanced"
    """Weigh rows so that both classes count the same, by the manifest's counts."""
    monitor: Literal["val/log_loss", "val/roc_auc", "val/pr_auc"] = "val/log_loss"
    """Validation metric that decides which epoch is best."""
    patience: PositiveInt = 10
    """Epochs without a better one before training stops."""
    clip_norm: Positive | None = None
    """Largest global norm of a step's gradient, over all workers."""
    accumulate_steps: PositiveInt = 1
    """Parts in which each replica computes its rows of a step, to need less memory."""
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """What layers compute in; weights stay float32. float16 scales the loss as it needs to be."""
    jit_compile: bool = False
    """Compile the forward and backward pass with XLA."""
    steps_per_call: PositiveInt = 1
    """Steps that one call of TensorFlow takes; more of them save time where steps are short."""
    all_reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradients are exchanged as."""
    all_reduce_bytes: PositiveInt | None = None
    """Most bytes of one exchange of gradients; by default all of them at once."""
    deterministic: bool = False
    """Choose operations that give the same bits each time on a GPU, too; slower."""
    checkpoint_every_steps: PositiveInt | None = None
    """Most steps that a failure costs. Checkpoints come a little more often, since they are written
    while training goes on, and one at the end of each epoch in any case."""
    keep_checkpoints: PositiveInt = 2
    """Latest checkpoints that are kept; a damaged one is passed over for the one before."""
    keep_best: PositiveInt = 1
    """Best epochs whose weights are kept."""
    calibrate: bool = True
    """Fit blend, scale and bias of the logit on the validation split at the end."""
    decision_threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["f1", "balanced_accuracy"] = (
        0.5
    )
    """Probability from which a row counts as positive, or what to choose it by on the validation
    split."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Failures to recover from, each from the latest checkpoint; -1 for any number. Errors in the
    data or the settings are not tried again."""
    max_preemptions: Annotated[int, Field(ge=-1)] = -1
    """Nodes taken away by the provider to recover from; -1 for any number."""
    hang_timeout_s: Positive = 900.0
    """Seconds without a finished step after which a worker counts as hanging, which is a failure;
    longer than its start and its first step take."""

    @model_validator(mode="after")
    def _workers_share_the_batch(self) -> Self:
        allowed, (low, high) = self.allowed_workers(), self.workers_range
        if low > high:
            raise ValueError(f"num_workers={low},{high}: the least is more than the most")
        if not allowed:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} cannot be split into "
                f"accumulate_steps={self.accumulate_steps} parts for each of "
                f"{self.replicas_per_worker} replicas"
            )
        if not [n for n in allowed if low <= n <= high]:
            workers = low if low == high else f"{low},{high}"
            raise ValueError(
                f"num_workers={workers} cannot share global_batch_size="
                f"{self.global_batch_size} evenly; it can be {', '.join(map(str, allowed))}"
            )
        return self

    @model_validator(mode="after")
    def _the_last_stage_is_reached(self) -> Self:
        before = sum(stage.epochs for stage in self.stages[:-1])
        if before >= self.epochs:
            raise ValueError(
                f"stages: those before the last take {before} of epochs={self.epochs}; the last "
                "one is never reached"
            )
        return self

    @property
    def workers_range(self) -> tuple[int, int]:
        """Least and most workers."""
        given = self.num_workers
        return (given, given) if isinstance(given, int) else given

    @property
    def replicas_per_worker(self) -> int:
        """Replicas of the model on one worker."""
        return self.gpus_per_worker if self.use_gpu else 1

    @property
    def checkpoint_cadence(self) -> int | None:
        """Steps between two checkpoints: so many that one may be written in those that are left."""
        every = self.checkpoint_every_steps
        return None if every is None else every - every // 4

    def allowed_workers(self) -> list[int]:
        """Return the numbers of workers that can share the global batch evenly, in order."""
        streams = num_streams(self.global_batch_size)
        parts = self.replicas_per_worker * self.accumulate_steps
        return [
            n
            for n in range(1, streams + 1)
            if streams % n == 0 and self.global_batch_size // n % parts == 0
        ]


class RunSpec(Spec):
    """The whole of a run: one YAML file, or flags."""

    run: RunSection = RunSection()
    prepare: PrepareSpec = PrepareSpec()
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    tune: TuneSpec = TuneSpec()

    @model_validator(mode="after")
    def _space_fits(self) -> Self:
        if self.tune.space or self.tune.first:
            from ray_jobs.tune.search.space import Space

            Space(self)
        return self

    @model_validator(mode="after")
    def _xla_exchanges_nothing(self) -> Self:
        train, most = self.train, self.train.workers_range[1] * self.train.replicas_per_worker
        if train.jit_compile and self.model.batch_norm == "sync" and most > 1:
            raise ValueError(
                "train.jit_compile=true cannot compile the exchanges of model.batch_norm=sync "
                "between workers; set batch_norm=local, or jit_compile=false"
            )
        return self

    def overlay(self, changes: dict[str, Any]) -> Self:
        """Return a copy with fields replaced by path, such as {"train.learning_rate": 1e-3}.

        Raises:
            ValueError: if a path is unknown or a value does not fit.
        """
        from ray_jobs.config.command_line import validate_spec, with_value

        tree = self.model_dump(mode="json")
        for path, value in changes.items():
            tree = with_value(tree, path, value)
        return validate_spec(type(self), tree)


class InferenceSpec(Spec):
    """What `evaluate` and `predict` share."""

    run: str
    """Run folder that `train` wrote."""
    data: str
    """Folder or URI of prepared data; for `predict` also a table of raw rows."""
    output: str
    """Folder or URI for the results."""
    batch_size: PositiveInt = 64
    """Rows that the model sees at once."""
    num_workers: PositiveInt = 1
    """Processes that hold a copy of the model."""
    use_gpu: bool = False
    """Give each of them one GPU."""
    cpus_per_worker: Positive = 1.0
    """Logical CPUs of each of them."""
    address: str | None = None
    """Ray cluster; by default $RAY_ADDRESS, else a local Ray is started for this job."""
    worker_logs: bool = False
    """Print what workers write to their logs."""


class EvaluateSpec(InferenceSpec):
    """Metrics and plots of a run on one split."""

    split: Split = "test"
    """Split to evaluate."""


class PredictSpec(InferenceSpec):
    """Probabilities of a run for prepared or raw rows."""

    split: Split | None = None
    """Split of prepared data; by default all of them."""
    images: str | None = None
    """For raw rows: path or URI of each image, with the table's columns in braces, such as
    `photos/{key}.jpg`; or the folder in which the run's own pattern finds them."""


class InspectSpec(Spec):
    """What is in prepared data, and what in it deserves a look."""

    POSITIONAL: ClassVar[str] = "prepared"

    prepared: str
    """Folder or URI that `prepare` wrote."""
    output: str | None = None
    """Folder or URI for inspect.html and inspect.json; by default the prepared folder itself."""
    max_rows: PositiveInt = 1_000_000
    """Rows of a split that are looked at; of a larger one a sample by hash of the key."""


class DemoSpec(Spec):
    """The whole way on generated data: prepare, train, evaluate, predict."""

    output: str = "demo"
    """Folder for the data and the runs; an earlier demo in it is replaced."""
    num_rows: Annotated[int, Field(ge=100)] = 1200
    """Rows to generate."""
    epochs: PositiveInt = 15
    """Most epochs of each of the three trainings."""
    num_workers: PositiveInt = 2
    """Workers of the fusion's training."""
    seed: NonNegativeInt = 0
    """Seed of data and training."""


__all__ = [
    "SPLITS",
    "DataSpec",
    "DemoSpec",
    "EvaluateSpec",
    "Fraction",
    "InspectSpec",
    "PredictSpec",
    "PrepareSpec",
    "RunSection",
    "RunSpec",
    "Split",
    "TrainSpec",
]
