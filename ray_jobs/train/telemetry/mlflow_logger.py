"""Logs a run to MLflow: parameters, metrics, artifacts and the model.

The run folder stores the ID of its MLflow run, so a resumed run resumes its MLflow run. Errors of
MLflow never end a training run.
"""

import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.cluster.connection import first_line
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.storage.folder import Folder
from ray_jobs.train.telemetry.history_keys import EPOCH, HISTORY, HISTORY_TABLE, STEP

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "multimodal-ray"
RUN_ID = "mlflow.json"
"""File of the run folder with the URI and the ID of its MLflow run."""
FAILURE = "failure"
"""Tag with the error of a failed run."""
ARTIFACTS = (
    "run.yaml", "manifest.json", "environment.json", HISTORY, HISTORY_TABLE, "summary.json",
)  # fmt: skip

_MAX_VALUE_CHARS = 6000
"""Maximum length of a parameter's value in MLflow."""
_PARAMETERS_PER_CALL = 100
_USER_INFO = re.compile(r"://[^/@\s]+@")


def tracking_uri(spec: RunSpec) -> str:
    """Return the tracking URI: the setting, $MLFLOW_TRACKING_URI, or a file in the runs' folder.

    Raises:
        JobError: If MLflow cannot write there.
    """
    storage = Folder(spec.run.storage_path)
    uri = spec.run.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        if not storage.is_local:
            raise JobError(
                f"run.tracking=mlflow needs a local run.storage_path for its SQLite file, not "
                f"{storage}; set run.tracking_uri to an MLflow server, such as http://HOST:5000"
            )
        return f"sqlite:///{storage.path}/mlflow.db"
    if uri.startswith("file:") or (":" not in uri and uri != "databricks"):
        path = uri.removeprefix("file://").removeprefix("file:")
        raise JobError(
            f"run.tracking_uri={uri} is a plain folder, which MLflow no longer supports; use "
            f"sqlite:///{Path(path).expanduser().absolute()}/mlflow.db"
        )
    if _USER_INFO.search(uri):
        raise JobError(
            f"the tracking URI {mask_credentials(uri)} contains credentials, which would be "
            "written to the run folder; set $MLFLOW_TRACKING_USERNAME and "
            "$MLFLOW_TRACKING_PASSWORD on every node for a server, or the database's own "
            "variables, such as $PGPASSWORD"
        )
    if uri.startswith("sqlite:///"):
        # Absolute, because workers run in another directory.
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).expanduser().absolute()}"
    return uri


def require_mlflow(spec: RunSpec) -> str:
    """Open MLflow's store once, before any worker starts, and return its URI.

    Raises:
        JobError: If the package is missing, or the store or server does not answer.
    """
    uri = tracking_uri(spec)
    try:
        _experiment(_client(uri), spec)
    except ImportError as error:
        raise JobError(
            f"run.tracking=mlflow needs packages that are not installed ({error}); run "
            "`pip install '.[mlflow]'` in the project folder on every node, or set "
            "run.tracking=none"
        ) from error
    except Exception as error:
        # Servers, database drivers and disks raise any class of error.
        raise JobError(
            f"could not connect to MLflow at {mask_credentials(uri)}: {_error_text(error)}; start "
            "it, set run.tracking_uri, or set run.tracking=none"
        ) from error
    return uri


class MlflowRun:
    """The MLflow run of a run folder, on rank 0 only.

    MLflow cannot delete points, so an epoch that is trained again is not logged again. The model
    is logged as files for `mm_model.load_model`, not with MLflow's Keras flavor, which would load
    it in processes that have not imported the layers of `mm_model`. `warn` is called once per
    outage of MLflow.
    """

    def __init__(self, folder: Folder, spec: RunSpec, warn: Callable[[str], None]) -> None:
        self.folder, self.spec, self._warn = folder, spec, warn
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._logged: set[int] = set()
        self._is_failing = False

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Log the new epochs; create or resume the MLflow run."""
        with self._warn_on_error():
            self._log_epochs(self._open(), history)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log missing epochs, the summary, the files and the model, and mark the run as FINISHED.

        Does nothing for a finished run.
        """
        with self._warn_on_error():
            if self._saved().get("finished"):
                return
            client = self._open()
            if self.folder.exists(HISTORY):
                lines = self.folder.read_bytes(HISTORY).decode("utf-8").splitlines()
                self._log_epochs(client, [json.loads(line) for line in lines])
            self._log_metrics(client, _flat({"summary": summary}, "/"), 0)
            self._log_files(client)
            client.set_terminated(self._run_id, "FINISHED")
            self.folder.write_json(RUN_ID, {**self._saved(), "finished": True})

    def end(self, status: str, error: str = "") -> None:
        """Set the status of an unfinished run, if there is one, and the error of a failed one."""
        with self._warn_on_error():
            saved = self._saved()
            if not saved or saved.get("finished"):
                return
            client = self._open()
            if error:
                client.set_tag(self._run_id, FAILURE, _text(error))
            client.set_terminated(self._run_id, status)

    @contextmanager
    def _warn_on_error(self) -> Iterator[None]:
        """Turn the errors of an outage into one warning; later calls log what is missing."""
        try:
            yield
        except Exception as error:
            # Servers, database drivers and disks raise any class of error.
            if not self._is_failing:
                self._is_failing = True
                self._warn(
                    f"could not write to MLflow ({_error_text(error)}); the run continues and is "
                    "complete in its folder"
                )
        else:
            self._is_failing = False

    def _open(self) -> "MlflowClient":
        """Return a client, after opening the run and reading which epochs it has."""
        if self._client is not None:
            return self._client
        client = _client(tracking_uri(self.spec))
        saved = self._saved()
        if saved:
            run = client.get_run(saved["run_id"])
            saved.pop("finished", None)
            self.folder.write_json(RUN_ID, saved)
            client.update_run(run.info.run_id, status="RUNNING")
            if FAILURE in run.data.tags:
                client.delete_tag(run.info.run_id, FAILURE)
        else:
            experiment = _experiment(client, self.spec)
            run = client.create_run(experiment, run_name=self.spec.run.name, tags=self._tags())
            uri = mask_credentials(tracking_uri(self.spec))
            self.folder.write_json(RUN_ID, {"tracking_uri": uri, "run_id": run.info.run_id})
        self._run_id = run.info.run_id
        self._log_parameters(client, run.data.params)
        points = client.get_metric_history(self._run_id, STEP)
        self._logged = {point.step for point in points}
        self._client = client
        return client

    def _saved(self) -> dict[str, Any]:
        """Return the run folder's record of its MLflow run; {} if it has none in this store."""
        if not self.folder.exists(RUN_ID):
            return {}
        saved = self.folder.read_json(RUN_ID)
        return saved if saved["tracking_uri"] == mask_credentials(tracking_uri(self.spec)) else {}

    def _tags(self) -> dict[str, str]:
        tags = {"run_folder": mask_credentials(str(self.folder))}
        if self.folder.exists("environment.json"):
            revision = self.folder.read_json("environment.json").get("git_revision")
            if revision:
                tags["mlflow.source.git.commit"] = revision
        return tags

    def _log_parameters(self, client: "MlflowClient", logged: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        # MLflow does not overwrite parameters. Those that changed when the run was resumed, such
        # as the number of workers, keep their first value.
        parameters = [
            Param(key, _text(value))
            for key, value in _flat(self.spec.model_dump(mode="json")).items()
            if key not in logged
        ]
        for start in range(0, len(parameters), _PARAMETERS_PER_CALL):
            batch = parameters[start : start + _PARAMETERS_PER_CALL]
            client.log_batch(self._run_id, params=batch)

    def _log_epochs(self, client: "MlflowClient", history: Sequence[Mapping[str, Any]]) -> None:
        for record in history:
            epoch = record[EPOCH]
            if epoch not in self._logged:
                metrics = {k: v for k, v in record.items() if k != EPOCH}
                self._log_metrics(client, metrics, epoch)
                self._logged.add(epoch)

    def _log_metrics(self, client: "MlflowClient", values: Mapping[str, Any], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [
            Metric(key, float(value), now_ms, step)
            for key, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        ]
        client.log_batch(self._run_id, metrics=metrics)

    def _log_files(self, client: "MlflowClient") -> None:
        with tempfile.TemporaryDirectory(prefix="mlflow-") as path:
            local = Path(path)
            models = [self.folder.download(n, local / n) for n in self.folder.names("model")]
            files = [self.folder.download(n, local / n) for n in ARTIFACTS if self.folder.exists(n)]
            for file in files:
                if file.suffix != ".parquet":
                    file.write_text(mask_credentials(file.read_text("utf-8")), "utf-8")
                client.log_artifact(self._run_id, str(file))
            if models:
                client.log_artifacts(self._run_id, str(local / "model"), "model")


def mask_credentials(text: str) -> str:
    """Return a text with the credentials in its URIs masked."""
    return _USER_INFO.sub("://***@", text)


def _client(uri: str) -> "MlflowClient":
    # No usage statistics without consent, and a timeout of seconds instead of MLflow's minutes.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _experiment(client: "MlflowClient", spec: RunSpec) -> str:
    """Return the ID of the experiment; create it if it does not exist."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is not None:
        return experiment.experiment_id
    from mlflow.exceptions import MlflowException

    # A server has its own location for artifacts; with a SQLite file, they are stored next to it.
    uri, location = tracking_uri(spec), None
    if uri.startswith("sqlite:///"):
        location = Path(uri.removeprefix("sqlite:///")).parent.joinpath("mlflow-artifacts").as_uri()
    try:
        return client.create_experiment(EXPERIMENT, artifact_location=location)
    except MlflowException:
        # Another run may have created it in the meantime.
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            raise
        return experiment.experiment_id


def _flat(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return the leaves of nested mappings by path."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            nested = _flat(value, separator)
            leaves |= {f"{key}{separator}{path}": leaf for path, leaf in nested.items()}
        else:
            leaves[key] = value
    return leaves


def _text(value: Any) -> str:
    """Return the value of a parameter or tag, masked and within MLflow's limit."""
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    text = mask_credentials(text)
    return text if len(text) <= _MAX_VALUE_CHARS else text[: _MAX_VALUE_CHARS - 1] + "…"


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {mask_credentials(first_line(error))[:300]}"
