"""A run in MLflow: parameters, metrics, artifacts and the model, beside the run folder.

The run folder keeps the id of its MLflow run, so that a run that goes on after a failure goes on in
MLflow, too.  Whatever MLflow's server or store does, the training goes on without it.
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
from ray_jobs.train.telemetry import console

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "multimodal-ray"
NOTE = "mlflow.json"
"""What the run folder remembers of its MLflow run."""
FAILURE = "failure"
"""Tag of a run that failed: why."""
ARTIFACTS = (
    "run.yaml", "manifest.json", "environment.json", console.HISTORY, console.HISTORY_TABLE,
    "summary.json",
)  # fmt: skip

_MOST_CHARACTERS = 6000
"""Of a parameter's value; MLflow refuses longer ones."""
_PARAMETERS_AT_ONCE = 100
_USER_INFO = re.compile(r"://[^/@\s]+@")


def tracking_uri(spec: RunSpec) -> str:
    """Return where a run is tracked: the setting, $MLFLOW_TRACKING_URI, or beside the runs.

    Raises:
        JobError: if none of them says a place that MLflow can write.
    """
    storage = Folder(spec.run.storage_path)
    given = spec.run.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        if not storage.is_local:
            raise JobError(
                f"run.tracking=mlflow keeps its SQLite file beside the runs, and {storage} is on "
                "no disk; set run.tracking_uri to an MLflow server, such as http://HOST:5000"
            )
        return f"sqlite:///{storage.path}/mlflow.db"
    if given.startswith("file:") or (":" not in given and given != "databricks"):
        path = given.removeprefix("file://").removeprefix("file:")
        raise JobError(
            f"run.tracking_uri={given}: MLflow writes to no plain folder any more; try "
            f"sqlite:///{Path(path).expanduser().absolute()}/mlflow.db"
        )
    if _USER_INFO.search(given):
        raise JobError(
            f"{masked(given)} holds a user name, perhaps with a password, which would be written "
            "into the run folder; for a server set $MLFLOW_TRACKING_USERNAME and "
            "$MLFLOW_TRACKING_PASSWORD on every node, for a database what it reads itself, such as "
            "$PGPASSWORD"
        )
    if given.startswith("sqlite:///"):
        # Workers run in another directory, where a relative path would mean something else.
        return f"sqlite:///{Path(given.removeprefix('sqlite:///')).expanduser().absolute()}"
    return given


def require_mlflow(spec: RunSpec) -> str:
    """Open MLflow's store once, before any worker is started, and return its URI.

    Raises:
        JobError: if the package is missing, or the store or server does not answer.
    """
    uri = tracking_uri(spec)
    try:
        _experiment(_client(uri), spec)
    except ImportError as error:
        raise JobError(
            f"run.tracking=mlflow needs packages that are not installed ({error}); run "
            "`pip install '.[mlflow]'` in the project's folder, on every node, or set "
            "run.tracking=none"
        ) from error
    except Exception as error:
        # Of any class: a server's, a database driver's, a disk's.
        raise JobError(
            f"MLflow at {masked(uri)} cannot be used: {_text_of(error)}; start it, or set "
            "run.tracking_uri or run.tracking=none"
        ) from error
    return uri


class MlflowRun:
    """The MLflow run of a run folder; on rank 0 alone.

    Points that an interrupted attempt has logged stay as they are, since MLflow takes none back: an
    epoch that is trained again is not logged twice. The model is logged as files, which
    `mm_model.load_model` loads, and not as MLflow's keras flavor: that one would load it, to find
    its requirements and to serve it, in processes that have not imported the layers of `mm_model`.

    Args:
        folder: of the run.
        spec: of the run.
        warn: takes a text when MLflow is in trouble, once an outage.
    """

    def __init__(self, folder: Folder, spec: RunSpec, warn: Callable[[str], None]) -> None:
        self.folder, self.spec, self._warn = folder, spec, warn
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._logged: set[int] = set()
        self._in_trouble = False

    def start(self) -> None:
        """Open the run, or go on with the one that the folder knows."""
        with self._going_on():
            self._open()

    def write(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Log the epochs that are not there yet."""
        with self._going_on():
            self._log_epochs(self._open(), history)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Log the summary's numbers, the run's files and its model; the run is FINISHED then.

        Epochs of the history that are not there yet are logged, too. Where all was done before,
        nothing is.
        """
        with self._going_on():
            if self._note().get("finished"):
                return
            client = self._open()
            if self.folder.exists(console.HISTORY):
                lines = self.folder.read_bytes(console.HISTORY).decode("utf-8").splitlines()
                self._log_epochs(client, [json.loads(line) for line in lines])
            self._log_metrics(client, _flat({"summary": summary}, "/"), 0)
            self._log_files(client)
            client.set_terminated(self._run_id, "FINISHED")
            self.folder.write_json(NOTE, {**self._note(), "finished": True})

    def fail(self, text: str) -> None:
        """Mark the run as FAILED, if there is one."""
        self._end("FAILED", text)

    def stop(self) -> None:
        """Mark the run as KILLED, which is MLflow's word for stopped, if there is one."""
        self._end("KILLED")

    def _end(self, status: str, failure: str | None = None) -> None:
        with self._going_on():
            note = self._note()
            # A finished run stays one, whatever becomes of its job.
            if not note or note.get("finished"):
                return
            client = self._open()
            if failure is not None:
                client.set_tag(self._run_id, FAILURE, _text(failure))
            client.set_terminated(self._run_id, status)

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Turn trouble into one warning; what could not be logged is tried again later."""
        try:
            yield
        except Exception as error:
            # Of any class: a server's, a database driver's, a disk's. None of them is the run's.
            if not self._in_trouble:
                self._in_trouble = True
                self._warn(
                    f"MLflow cannot be written ({_text_of(error)}); the run goes on, and is "
                    "whole in its folder"
                )
        else:
            self._in_trouble = False

    def _open(self) -> "MlflowClient":
        """Return a client, with the run open and the epochs known that it has."""
        if self._client is not None:
            return self._client
        client = _client(tracking_uri(self.spec))
        note = self._note()
        if note:
            run = client.get_run(note["run_id"])
            note.pop("finished", None)
            self.folder.write_json(NOTE, note)
            client.update_run(run.info.run_id, status="RUNNING")
            if FAILURE in run.data.tags:
                client.delete_tag(run.info.run_id, FAILURE)
        else:
            experiment = _experiment(client, self.spec)
            run = client.create_run(experiment, run_name=self.spec.run.name, tags=self._tags())
            uri = masked(tracking_uri(self.spec))
            self.folder.write_json(NOTE, {"tracking_uri": uri, "run_id": run.info.run_id})
        self._run_id = run.info.run_id
        self._log_parameters(client, run.data.params)
        points = client.get_metric_history(self._run_id, console.STEP)
        self._logged = {point.step for point in points}
        self._client = client
        return client

    def _note(self) -> dict[str, Any]:
        """Return what the folder knows of its MLflow run; nothing if it has none in this store."""
        if not self.folder.exists(NOTE):
            return {}
        note = self.folder.read_json(NOTE)
        return note if note["tracking_uri"] == masked(tracking_uri(self.spec)) else {}

    def _tags(self) -> dict[str, str]:
        tags = {"run_folder": masked(str(self.folder))}
        if self.folder.exists("environment.json"):
            revision = self.folder.read_json("environment.json").get("git_revision")
            if revision:
                tags["mlflow.source.git.commit"] = revision
        return tags

    def _log_parameters(self, client: "MlflowClient", there: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        # MLflow takes a parameter once. What may differ when a run goes on, such as the number of
        # workers, stays what it was at first.
        parameters = [
            Param(key, _text(value))
            for key, value in _flat(self.spec.model_dump(mode="json")).items()
            if key not in there
        ]
        for start in range(0, len(parameters), _PARAMETERS_AT_ONCE):
            part = parameters[start : start + _PARAMETERS_AT_ONCE]
            client.log_batch(self._run_id, params=part)

    def _log_epochs(self, client: "MlflowClient", history: Sequence[Mapping[str, Any]]) -> None:
        for record in history:
            epoch = record[console.EPOCH]
            if epoch not in self._logged:
                metrics = {k: v for k, v in record.items() if k != console.EPOCH}
                self._log_metrics(client, metrics, epoch)
                self._logged.add(epoch)

    def _log_metrics(self, client: "MlflowClient", values: Mapping[str, Any], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value in _numbers(values).items()]
        client.log_batch(self._run_id, metrics=metrics)

    def _log_files(self, client: "MlflowClient") -> None:
        with tempfile.TemporaryDirectory(prefix="mlflow-") as path:
            local = Path(path)
            models = [self.folder.download(n, local / n) for n in self.folder.names("model")]
            files = [self.folder.download(n, local / n) for n in ARTIFACTS if self.folder.exists(n)]
            for file in files:
                if file.suffix != ".parquet":
                    file.write_text(masked(file.read_text("utf-8")), "utf-8")
                client.log_artifact(self._run_id, str(file))
            if models:
                client.log_artifacts(self._run_id, str(local / "model"), "model")


def masked(text: str) -> str:
    """Return a text without the user names and passwords of the URIs in it."""
    return _USER_INFO.sub("://***@", text)


def _client(uri: str) -> "MlflowClient":
    # A training sends nothing to anyone that its user did not name, and waits for a server that is
    # gone some seconds, not the minutes that are MLflow's default.
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
    """Return the experiment's id; the first one that asks makes it."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    from mlflow.exceptions import MlflowException

    # A server knows where its artifacts go; a file on disk has them beside it.
    uri = tracking_uri(spec)
    beside = None
    if uri.startswith("sqlite:///"):
        beside = Path(uri.removeprefix("sqlite:///")).parent.joinpath("mlflow-artifacts").as_uri()
    try:
        return client.create_experiment(EXPERIMENT, artifact_location=beside)
    except MlflowException:
        # Another run of these was quicker.
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            raise
        return found.experiment_id


def _flat(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return the leaves of nested mappings by their paths."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            below = _flat(value, separator)
            leaves |= {f"{key}{separator}{path}": leaf for path, leaf in below.items()}
        else:
            leaves[key] = value
    return leaves


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what can be a metric: numbers that are there, and finite."""
    return {
        key: float(value)
        for key, value in record.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value)
    text = masked(text)
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def _text_of(error: Exception) -> str:
    return f"{type(error).__name__}: {masked(first_line(error))[:300]}"
