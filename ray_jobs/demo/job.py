"""Run the whole pipeline on generated data: prepare, train, evaluate, predict.

Output: generated data, shards, four run folders (fusion and one for each kind of input alone),
metrics, plots and predictions in the output folder, and a table that compares the models.

Run:    python -m ray_jobs.demo
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from ray_jobs.cluster import connection
from ray_jobs.config import command_line
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import EvaluateSpec, PredictSpec
from ray_jobs.config.spec import DemoSpec, RunSpec
from ray_jobs.evaluate.job import evaluate
from ray_jobs.predict.job import predict
from ray_jobs.prepare.job import prepare
from ray_jobs.train.job import fit

_MARK = "made-by-demo"
_SPEC = Path(__file__).parents[1] / "specs" / "demo.yaml"
_VARIANTS: dict[str, dict[str, Any]] = {
    "image only": {"model.numeric.kind": "none", "model.text.kind": "none"},
    "numeric only": {"model.image.kind": "none", "model.text.kind": "none"},
    "text only": {"model.image.kind": "none", "model.numeric.kind": "none"},
    "fusion": {},
}


def demo(spec: DemoSpec) -> dict[str, float]:
    """Run all jobs and return the ROC AUC of each variant on the test split.

    Raises:
        JobError: If the output folder contains files that are not from a demo, or a job fails.
    """
    from ray_jobs.demo.synthetic import write_demo_data

    output = _create_output(Path(spec.output))
    prepared = str(output / "prepared")
    base = command_line.validate_spec(RunSpec, command_line.read_yaml(str(_SPEC))).overlay(
        {
            "run.storage_path": str(output / "runs"),
            "run.seed": spec.seed,
            "prepare.images": str(output / "data" / "images"),
            "prepare.table": str(output / "data" / "table.csv"),
            "prepare.output": prepared,
            "data.prepared": prepared,
            "train.epochs": spec.epochs,
            "train.num_workers": spec.num_workers,
        }
    )
    metrics: dict[str, dict[str, Any]] = {}
    cpu_settings = f"num_workers={spec.num_workers}"
    with connection.connected("local", num_cpus=spec.num_workers, cpu_settings=cpu_settings):
        with _step("generate data"):
            write_demo_data(output / "data", spec.num_rows, spec.seed)
        with _step("prepare"):
            prepare(base)
        for variant, changes in _VARIANTS.items():
            name = variant.replace(" ", "-")
            run, results = str(output / "runs" / name), str(output / "evaluation" / name)
            with _step(f"train: {variant}"):
                if variant != "fusion":
                    changes = {**changes, "train.num_workers": 1}
                fit(base.overlay({**changes, "run.name": name}))
            with _step(f"evaluate: {variant}"):
                job = EvaluateSpec(run=run, data=prepared, output=results)
                if variant != "fusion":
                    job = job.model_copy(update={"baselines": False, "explain": "none"})
                metrics[variant] = evaluate(job)
        run, results = str(output / "runs" / "fusion"), str(output / "predictions")
        with _step("predict: fusion"):
            predict(PredictSpec(run=run, data=prepared, split="test", output=results))
    _print_results(metrics, output)
    return {variant: values["roc_auc"] for variant, values in metrics.items()}


def _create_output(output: Path) -> Path:
    output = output.absolute()
    if output.exists():
        if any(output.iterdir()) and not (output / _MARK).exists():
            raise JobError(
                f"output={output} contains files that are not from a demo; use another folder"
            )
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / _MARK).touch()
    return output


@contextmanager
def _step(title: str) -> Iterator[None]:
    console, started = Console(highlight=False), time.monotonic()
    console.rule(f"[bold]{title}", align="left")
    yield
    console.print(f"  [dim]{time.monotonic() - started:.0f} s[/dim]\n")


def _print_results(metrics: dict[str, dict[str, Any]], output: Path) -> None:
    columns = {"ROC AUC": "roc_auc", "accuracy": "accuracy", "log loss": "log_loss", "ECE": "ece"}
    table = Table(
        "model",
        *(Column(name, justify="right") for name in columns),
        title="test split",
        title_justify="left",
    )
    for variant, values in metrics.items():
        row = [f"{values[key]:.4f}" for key in columns.values()]
        table.add_row(variant, *row, style="bold" if variant == "fusion" else None)
    console = Console(highlight=False, soft_wrap=True)
    console.rule("[bold]results", align="left")
    console.print(table)
    for name, path in {
        "data": "data/table.csv",
        "prepared": "prepared/manifest.json",
        "run": "runs/fusion",
        "model": "runs/fusion/model/model.keras",
        "report": "evaluation/fusion/report.html",
        "predictions": "predictions",
    }.items():
        console.print(f"  {name:<12} {output / path}")
