"""Settings of the verbs that use a finished run: `evaluate`, `predict`, `export`, `serve`."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from mm_model.spec import Positive, Spec
from ray_jobs.config.prepare_spec import Split


class InferenceSpec(Spec):
    """Settings of both `evaluate` and `predict`."""

    run: str
    """Run folder that `train` wrote."""
    data: str
    """Folder or URI of prepared data."""
    output: str
    """Folder or URI for the results."""
    batch_size: PositiveInt = 64
    """Rows per model call."""
    num_workers: PositiveInt = 1
    """Number of processes, each with its own copy of the model."""
    use_gpu: bool = False
    """Whether each process uses a GPU."""
    cpus_per_worker: Positive = 1.0
    """Logical CPUs per process."""
    address: str | None = None
    """Address of a Ray cluster, such as `auto`. Default: $RAY_ADDRESS, else a new local Ray
    instance."""
    worker_logs: bool = False
    """Print the workers' log output."""


class EvaluateSpec(InferenceSpec):
    """Report of a trained run for one split: metrics, comparisons, slices, thresholds."""

    split: Split = "test"
    """Split to evaluate."""
    compare: tuple[str, ...] = ()
    """Run folders of other models to compare with on the same rows, such as `runs/a,runs/b`."""
    cost_false_negative: Positive = 1.0
    """Cost of a positive row that is predicted negative; the report has the threshold of the least
    expected cost."""
    cost_false_positive: Positive = 1.0
    """Cost of a negative row that is predicted positive."""
    baselines: bool = True
    """Whether to train logistic regression and gradient boosting on the training rows, to compare
    with."""
    explain: Literal["none", "global", "rows"] = "rows"
    """What to explain: the importance of each column on up to 500 rows (`global`), and also what
    the model looks at in the worst rows (`rows`)."""


class PredictSpec(InferenceSpec):
    """Predictions of a trained run for prepared or raw rows."""

    data: str
    """Folder or URI of prepared data, or a table of raw rows."""
    split: Split | None = None
    """Split of prepared data to predict. Default: all splits."""
    images: str | None = None
    """For raw rows: pattern for the path or URI of each image, with column names in braces, such as
    `photos/{key}.jpg`; or the folder of the images, which are then found by the settings that the
    run's data was prepared with, such as `prepare.image_pattern` or `prepare.image_column`."""
    distance: bool = False
    """Add a column with the distance of each row from the training rows, above 1 for rows farther
    away than 99 % of the validation rows."""


class ExportSpec(Spec):
    """A model in the format of another runtime, and how it differs from the run."""

    run: str
    """Run folder that `train` wrote."""
    format: Literal["saved_model", "onnx", "litert"] = "onnx"
    """Format: TensorFlow SavedModel, ONNX, or LiteRT (TensorFlow Lite)."""
    precision: Literal["float32", "float16", "int8"] = "float32"
    """Numbers of the weights: also int8 for ONNX, float16 and int8 for LiteRT."""
    output: str | None = None
    """Folder or URI for the result. Default: `export/FORMAT-PRECISION` in the run folder."""
    data: str | None = None
    """Prepared data to compare on. Default: that of the training."""
    split: Split = "test"
    """Split to compare on."""
    max_rows: PositiveInt = 500
    """Maximum number of rows to compare on."""


class ServeSpec(Spec):
    """Answers to requests over HTTP with a trained run."""

    run: str
    """Run folder that `train` wrote."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all networks of the machine."""
    port: PositiveInt = 8000
    """Port to listen on."""
    second_run: str | None = None
    """Run folder of another model with the same inputs, which answers some of the requests."""
    second_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the requests that the model of `second_run` answers."""
    image_folders: tuple[str, ...] = ()
    """Local folders, or URIs of object storage, whose images requests may name by path or URI."""
    token_file: str | None = None
    """File with a token that clients must send as `Authorization: Bearer TOKEN`. Default: none."""
    num_replicas: PositiveInt = 1
    """Number of processes, each with its own copy of the model."""
    max_replicas: PositiveInt = 1
    """If greater than `num_replicas`, replicas are added while requests wait, up to this number."""
    cpus_per_replica: Positive = 1.0
    """Logical CPUs per replica."""
    gpus_per_replica: NonNegativeFloat = 0.0
    """GPUs per replica; 0.5 for two replicas on a GPU."""
    max_batch_size: PositiveInt = 32
    """Maximum rows per model call."""
    max_queued_requests: PositiveInt = 128
    """Requests that may wait for a replica; others are answered with 503 and Retry-After."""
    max_request_mb: Positive = 32.0
    """Maximum size of a request in MiB."""
    timeout_s: Positive = 30.0
    """Seconds until a request fails with 408. A replica that is stopped has the same time to finish
    its requests."""
    address: str | None = None
    """Address of a Ray cluster, such as `auto`. Default: $RAY_ADDRESS, else a new local Ray
    instance."""
    config_file: str | None = None
    """Write a configuration for `serve deploy` into this file, and serve nothing."""
    worker_logs: bool = False
    """Print the replicas' log output."""
