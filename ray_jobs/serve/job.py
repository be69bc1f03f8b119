"""Serve a trained run over HTTP.

Answers POST /predict with the label and the probability of each row; /docs describes the columns.
On this machine, it runs until Ctrl-C. With --address, it deploys the application on a cluster and
returns; the same command with another --run replaces the model without failed requests.

Run:   python -m ray_jobs.serve --run runs/first
"""

import io
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from ray_jobs.cluster import compat_ray, connection
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import ServeSpec
from ray_jobs.config.text import names_text
from ray_jobs.predict.trained_run import TrainedRun, open_run
from ray_jobs.serve.access_rules import LOOPBACK
from ray_jobs.serve.image_folders import ImageFolders
from ray_jobs.serve.request_schema import input_names

APPLICATION = "multimodal"
_LOGGING = {"log_level": "WARNING"}


def serve(spec: ServeSpec) -> None:
    """Serve a run until Ctrl-C, or deploy it on the cluster at `--address`.

    Raises:
        JobError: If the run is not finished, Ray Serve is not installed, the port is in use, or
            the model cannot be loaded.
    """
    if spec.config_file:
        import yaml

        Path(spec.config_file).write_text(yaml.safe_dump(deploy_config(spec), sort_keys=False))
        print(f"wrote {spec.config_file}; run `serve deploy {spec.config_file}`")
        return
    with serving(spec) as (url, run, is_local):
        _print(spec, url, run)
        if is_local:
            stop = threading.Event()
            signal.signal(signal.SIGTERM, lambda *_: stop.set())
            with suppress(KeyboardInterrupt):
                stop.wait()


@contextmanager
def serving(spec: ServeSpec) -> Iterator[tuple[str, TrainedRun, bool]]:
    """Serve a run in the block; yield its URL, the run, and whether Ray ends with the block.

    An application on a cluster that was running before stays there.

    Raises:
        JobError: As in `serve`.
    """
    ray_serve = _import_serve()
    import ray

    run = _open_runs(spec)
    token, is_connected = _token(spec), ray.is_initialized()
    # The second model has as many replicas.
    num_replicas = spec.num_replicas * (2 if spec.second_run else 1)
    http_options = {"host": spec.host, "port": spec.port, "request_timeout_s": spec.timeout_s}
    with (
        ExitStack() as ending,
        connection.connected(
            spec.address,
            num_cpus=num_replicas * spec.cpus_per_replica,
            num_gpus=num_replicas * spec.gpus_per_replica,
            data_cpus=0,
            cpu_settings="num_replicas and cpus_per_replica",
            worker_logs=spec.worker_logs,
        ),
    ):
        is_local = connection.owns_ray() and not is_connected
        try:
            ray_serve.start(http_options=http_options, logging_config=_LOGGING)
            _require_same(http_options)
            ray_serve.run(application(spec, token), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            if is_local:
                ray_serve.shutdown()
            raise JobError(f"could not serve {spec.run}: {connection.first_line(error)}") from error
        try:
            host = f"[{spec.host}]" if ":" in spec.host else spec.host
            yield f"http://{host}:{spec.port}", run, is_local
        finally:
            if is_local:
                # Ray prints an error when Serve ends, since Serve kills its own controller.
                ending.enter_context(redirect_stdout(io.StringIO()))
                ray_serve.shutdown()


def build(settings: dict[str, Any]) -> Any:
    """Return the application, as `serve deploy` calls it with the settings in a configuration."""
    spec = ServeSpec.model_validate(settings)
    _open_runs(spec)
    return application(spec, _token(spec))


def deploy_config(spec: ServeSpec) -> dict[str, Any]:
    """Return the configuration for `serve deploy` or a RayService."""
    settings = spec.model_dump(mode="json", exclude_defaults=True, exclude={"config_file"})
    return {
        "http_options": {
            "host": spec.host,
            "port": spec.port,
            "request_timeout_s": spec.timeout_s,
        },
        "logging_config": _LOGGING,
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": f"{__name__}:{build.__name__}",
                "args": settings,
            }
        ],
    }


def application(spec: ServeSpec, token: str | None) -> Any:
    """Return the application of Ray Serve."""
    from ray import serve as ray_serve
    from ray.serve.config import BackpressureConfig

    from ray_jobs.serve.replica import Replica

    replicas: dict[str, Any] = {"num_replicas": spec.num_replicas}
    if spec.max_replicas > spec.num_replicas:
        limits = {"min_replicas": spec.num_replicas, "max_replicas": spec.max_replicas}
        target = {"target_ongoing_requests": spec.max_batch_size}
        replicas = {"autoscaling_config": {**limits, **target}}
    deployment: Any = ray_serve.deployment(
        name="model",
        ray_actor_options={
            "num_cpus": spec.cpus_per_replica,
            "num_gpus": spec.gpus_per_replica,
        },
        max_ongoing_requests=2 * spec.max_batch_size,
        max_queued_requests=spec.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        graceful_shutdown_timeout_s=spec.timeout_s,
        # With the access log, which has no contents of requests.
        logging_config={"encoding": "JSON"},
        # New replicas answer before old ones end.
        max_surge_percent=100,
        **replicas,
    )
    second = None
    if spec.second_run:
        changes = {"run": spec.second_run, "second_run": None}
        options = {"name": "second", "num_replicas": spec.num_replicas, "autoscaling_config": None}
        second = deployment(Replica).options(**options).bind(spec.model_copy(update=changes), None)
    return deployment(ray_serve.ingress()(Replica)).bind(spec, token, second)


def _open_runs(spec: ServeSpec) -> TrainedRun:
    """Return the run; check that the second one takes the same requests."""
    run = open_run(spec.run)
    if spec.second_run:
        second = open_run(spec.second_run)
        first_inputs, second_inputs = map(input_names, (run, second))
        if first_inputs != second_inputs:
            raise JobError(
                f"--second_run={spec.second_run} takes other inputs "
                f"({names_text(second_inputs)}) than --run ({names_text(first_inputs)})"
            )
    ImageFolders(spec.image_folders, 0)
    return run


def _require_same(http_options: dict[str, Any]) -> None:
    """Check that Ray Serve, which may have been running before, has these options.

    Raises:
        JobError: If it has others, which it keeps.
    """
    running = compat_ray.serve_http_options()
    found = {name: getattr(running, name) for name in http_options}
    # Ray Serve that others have started may have no time limit.
    if any(value not in (None, http_options[name]) for name, value in found.items()):
        raise JobError(
            "Ray Serve already runs on this cluster with --host {host} --port {port} --timeout_s "
            "{request_timeout_s}; set the same, or end it with `serve shutdown`".format(**found)
        )


def _import_serve() -> Any:
    # Read when Ray Serve is imported, here and in the processes of a local Ray: an empty request
    # takes 6 ms instead of 11 if its processes use gRPC instead of calls of actors.
    os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
    try:
        import python_multipart  # noqa: F401
        from ray import serve as ray_serve
    except ImportError as error:
        raise JobError(
            f"`serve` needs packages that are not installed ({error}); run "
            '`pip install "multimodal-ray[serve]"`'
        ) from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return ray_serve


def _token(spec: ServeSpec) -> str | None:
    if spec.token_file is None:
        return None
    try:
        token = Path(spec.token_file).expanduser().read_text().strip()
    except OSError as error:
        raise JobError(f"could not read --token_file={spec.token_file}: {error}") from error
    if not token:
        raise JobError(f"--token_file={spec.token_file} is empty; write a token into it")
    return token


def _print(spec: ServeSpec, url: str, run: TrainedRun) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"serving [bold]{escape(str(run.folder))}[/bold] at {url}")
    console.print(f"  try a row there in a browser; {url}/docs describes POST /predict")
    if spec.host not in LOOPBACK and spec.token_file is None:
        console.print(
            "  [yellow]every machine that reaches this address can use it; set --token_file"
            "[/yellow]"
        )
