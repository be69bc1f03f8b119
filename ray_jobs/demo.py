"""Go the whole way on generated data: prepare, train, evaluate, predict.

Leaves: data, prepared shards, three run folders (both inputs, image only, numbers only), metrics,
plots and predictions below the output folder, and a table of what the fusion gained.

Run:   python -m ray_jobs.demo
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_jobs import cli, cluster
from ray_jobs.cli import JobError
from ray_jobs.spec import DemoSpec, EvaluateSpec, PredictSpec, RunSpec

_MARK = "made-by-demo"
_SPEC = Path(__file__).parent / "specs" / "demo.yaml"
_VARIANTS: dict[str, dict[str, Any]] = {
    "fusion": {},
    "image only": {"model.numeric.kind": "none", "train.num_workers": 1},
    "numeric only": {"model.image.kind": "none", "train.num_workers": 1},
}


def demo(spec: DemoSpec) -> dict[str, float]:
    """Run all jobs and return the test ROC AUC of each variant.

    Raises:
        JobError: if the output folder holds something else, or a job fails.
    """
    from ray_jobs.demo_data import write_demo_data
    from ray_jobs.evaluate import evaluate
    from ray_jobs.predict import predict
    from ray_jobs.prepare import prepare
    from ray_jobs.train import fit

    output = _emptied(Path(spec.output))
    base = cli.validate_spec(RunSpec, cli.read_yaml(str(_SPEC))).overlay(
        {
            "run.storage_path": str(output / "runs"),
            "run.seed": spec.seed,
            "prepare.images": str(output / "data" / "images"),
            "prepare.table": str(output / "data" / "table.csv"),
            "prepare.output": str(output / "prepared"),
            "data.prepared": str(output / "prepared"),
            "train.epochs": spec.epochs,
            "train.num_workers": spec.num_workers,
        }
    )
    metrics: dict[str, dict[str, Any]] = {}
    with cluster.connected("local", num_cpus=spec.num_workers):
        with _step("make demo data"):
            write_demo_data(output / "data", spec.num_rows, spec.seed)
        with _step("prepare"):
            prepare(base)
        for variant, changes in _VARIANTS.items():
            name = variant.replace(" ", "-")
            with _step(f"train: {variant}"):
                fit(base.overlay({**changes, "run.name": name}))
        for variant in _VARIANTS:
            name = variant.replace(" ", "-")
            with _step(f"evaluate: {variant}"):
                metrics[variant] = evaluate(
                    EvaluateSpec(
                        run=str(output / "runs" / name),
                        data=str(output / "prepared"),
                        output=str(output / "evaluation" / name),
                    )
                )
        with _step("predict: fusion"):
            predict(
                PredictSpec(
                    run=str(output / "runs" / "fusion"),
                    data=str(output / "prepared"),
                    split="test",
                    output=str(output / "predictions"),
                )
            )
    _print_result(metrics, output)
    return {variant: found["roc_auc"] for variant, found in metrics.items()}


def _emptied(output: Path) -> Path:
    output = output.absolute()
    if output.exists():
        if any(output.iterdir()) and not (output / _MARK).exists():
            raise JobError(
                f"{output} holds something that no demo made; give another folder as --output"
            )
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / _MARK).touch()
    return output


@contextmanager
def _step(title: str) -> Iterator[None]:
    from rich.console import Console

    console = Console(highlight=False)
    console.rule(f"[bold]{title}", align="left")
    started = time.monotonic()
    yield
    console.print(f"  [dim]{time.monotonic() - started:.0f} s[/dim]\n")


def _print_result(metrics: dict[str, dict[str, Any]], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.rule("[bold]result", align="left")
    table = Table(title="test split", title_justify="left")
    table.add_column("model")
    for name in ("ROC AUC", "accuracy", "log loss", "ECE"):
        table.add_column(name, justify="right")
    for variant in ("image only", "numeric only", "fusion"):
        found = metrics[variant]
        row = [f"{found[key]:.4f}" for key in ("roc_auc", "accuracy", "log_loss", "ece")]
        table.add_row(variant, *row, style="bold" if variant == "fusion" else None)
    console.print(table)
    for what, where in (
        ("data", "data/table.csv"),
        ("prepared", "prepared/manifest.json"),
        ("run", "runs/fusion"),
        ("model", "runs/fusion/model/model.keras"),
        ("plots", "evaluation/fusion"),
        ("predictions", "predictions"),
    ):
        console.print(f"  {what:<12} {output / where}")


def main() -> None:
    """Run from the command line."""
    cli.main(DemoSpec, demo, __doc__)


if __name__ == "__main__":
    main()
