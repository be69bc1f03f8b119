"""Estimate how good a model is on few rows: train and score it on cross-validation folds.

Reads: shards and manifest.json from `prepare`; the training and validation rows are divided into
folds. The test split is used only to evaluate the mean model. Writes: rows.parquet with the
prediction of each row by a model that was not trained on it, metrics.json with intervals, a run
folder for each fold, and with `cv.export=mean` the run folder of the mean of all models. Running
the same command again continues an interrupted cross-validation.

Run:   python -m ray_jobs.cross_validate ray_jobs/specs/houses.yaml --run.name houses-cv
       python -m ray_jobs.cross_validate ray_jobs/specs/houses.yaml --compare other.yaml
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ray_jobs.checks.finding import Finding, print_findings
from ray_jobs.checks.preflight import preflight
from ray_jobs.cluster import connection
from ray_jobs.cluster.capacity import cpu_settings
from ray_jobs.cluster.connection import root_cause
from ray_jobs.config.command_line import read_yaml, validate_spec, with_value
from ray_jobs.config.errors import JobError
from ray_jobs.config.inference_spec import EvaluateSpec
from ray_jobs.config.spec import CrossValidateSpec, RunSpec
from ray_jobs.config.text import count_text
from ray_jobs.cross_validate.cv_results import (
    METRICS,
    OutOfFold,
    compare,
    fold_findings,
    read_rows,
    summarize,
    write_rows,
)
from ray_jobs.data.folds import Fold, FoldRows, fold_manifest, make_folds, read_fold_rows
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.finalize import SUMMARY, write_reference, write_validation
from ray_jobs.train.job import (
    CHANGEABLE,
    SPEC,
    Run,
    begin_run,
    open_run,
    require_same,
    require_trainable,
    run_folder,
)

CV_SPEC = "cross_validate.yaml"
FOLDS = "folds"
MEAN = "mean"
METRICS_FILE = "metrics.json"

_SAME = (
    "run.seed", "data.image_size", "data.text_length", "data.shuffle_window_rows",
    "data.buffer_bytes", "model", "train", "cv.folds", "cv.repeats",
)  # fmt: skip
"""Settings that must not change when a cross-validation continues."""
_SHARED = (
    "run.storage_path", "run.address", "run.seed", "data.prepared", "train.num_workers",
    "train.use_gpu", "train.gpus_per_worker", "train.cpus_per_worker", "train.resources_per_worker",
    "cv",
)  # fmt: skip
"""Settings that all compared specs take from the first one."""


def cross_validate(spec: CrossValidateSpec) -> dict[str, Any]:
    """Cross-validate a spec, and compare it with others; return the content of metrics.json.

    Raises:
        JobError: If the data, the cluster or a folder is unsuitable, or folds failed.
        Interrupted: If the user stopped the job.
    """
    first = open_run(spec)
    spec = CrossValidateSpec.model_validate(first.spec.model_dump())
    rows = read_fold_rows(Folder(spec.data.prepared), first.manifest)
    folds = make_folds(rows, spec.cv.folds, spec.cv.repeats, spec.run.seed)
    spec = spec.overlay({"cv.folds": folds[-1].index + 1})
    runs = [open_run(each) for each in (spec, *_compared_specs(spec))]
    for run in runs:
        _begin(run, rows, folds)
    train, workers = spec.train, spec.train.workers_range[0]
    # The evaluation of the mean model needs another CPU.
    cpus_for_mean = train.cpus_per_worker + 1 if spec.cv.export == "mean" else 0
    with connection.connected(
        spec.run.address,
        num_cpus=max(workers * train.cpus_per_worker, cpus_for_mean),
        cpu_settings=cpu_settings(train),
        num_gpus=workers * train.gpus_per_worker if train.use_gpu else 0,
        data_cpus=0,
        worker_logs=spec.run.worker_logs,
        object_store_memory=spec.data.object_store_memory,
    ):
        for run in runs:
            preflight(run.spec, run.manifest)
        results = [_train_and_score(run, rows, folds) for run in runs]
        metrics = _summarize(runs, folds, results)
        if spec.cv.export == "mean":
            metrics["mean"] = _export_mean(runs[0], rows, folds, results[0])
            runs[0].folder.write_json(METRICS_FILE, metrics)
    _print(runs[0], metrics)
    return metrics


def _compared_specs(spec: CrossValidateSpec) -> list[RunSpec]:
    """Return the specs to compare with, on the same data and folds.

    Raises:
        JobError: If two would have the same run folder.
    """
    tree = spec.model_dump(mode="json", exclude={"compare"})
    specs: list[RunSpec] = []
    for path in spec.compare:
        other = validate_spec(RunSpec, read_yaml(path)).model_dump(mode="json")
        for name in _SHARED:
            section, _, setting = name.partition(".")
            other = with_value(other, name, tree[section][setting] if setting else tree[section])
        name = f"{spec.run.name}-{Path(path).stem}"
        if name in [each.run.name for each in specs]:
            raise JobError(f"--compare names two files {Path(path).name}; rename one of them")
        specs.append(validate_spec(RunSpec, with_value(other, "run.name", name)))
    return specs


def _begin(run: Run, rows: FoldRows, folds: Sequence[Fold]) -> None:
    """Write the first files of a cross-validation and its folds, unless it continues.

    Raises:
        JobError: If the folder has something else, or the settings do not fit the folds.
    """
    spec, folder = run.spec, run.folder
    if folder.exists(CV_SPEC):
        require_same("cross-validation", run, CV_SPEC, _SAME, {"train": CHANGEABLE})
    elif any(folder.names()):
        raise JobError(f"{folder} contains something else; choose another --run.name")
    manifests = [fold_manifest(rows, fold) for fold in folds]
    specs = [_fold_spec(run, fold) for fold in folds]
    for each, manifest in zip(specs, manifests, strict=True):
        require_trainable(each, manifest)
    run.manifest.write(folder)
    folder.write_text(CV_SPEC, yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False))
    for each, manifest in zip(specs, manifests, strict=True):
        place = run_folder(each)
        if not place.exists(SPEC):
            begin_run(each, manifest, place)
        elif read_manifest(place) != manifest:
            raise JobError(
                f"{place} has other rows than its fold, which an earlier version of the program "
                "made; choose another --run.name"
            )


def _train_and_score(run: Run, rows: FoldRows, folds: Sequence[Fold]) -> OutOfFold:
    """Train the models of all folds that are not complete, and return the predictions."""
    from ray_jobs.cross_validate.run_folds import run_folds

    print(
        f"{run.spec.run.name}: {count_text(len(folds), 'fold')} of "
        f"{count_text(rows.table.num_rows, 'row')} → {run.folder}"
    )
    specs = [_fold_spec(run, fold) for fold in folds]
    run_folds(specs, lambda index: _print_fold(specs[index]))
    out_of_fold = OutOfFold.of(rows, folds, [read_rows(run_folder(each)) for each in specs])
    write_rows(run.folder, out_of_fold.table())
    return out_of_fold


def _fold_spec(run: Run, fold: Fold) -> RunSpec:
    spec = RunSpec.model_validate(run.spec.model_dump(exclude={"compare"}))
    num_folds = spec.cv.folds or 1
    return spec.overlay(
        {
            # Models with different initial weights gain more from being averaged.
            "run.seed": spec.run.seed + fold.repeat * num_folds + fold.index,
            "run.name": fold.name,
            "run.storage_path": (run.folder / FOLDS).uri,
            "run.tracking": "none",
            "train.num_workers": spec.train.workers_range[0],
            # Several folds may train at the same time.
            "data.cache_bytes": spec.data.cache_bytes // num_folds,
        }
    )


def _summarize(
    runs: Sequence[Run], folds: Sequence[Fold], results: Sequence[OutOfFold]
) -> dict[str, Any]:
    """Write and return the metrics and comparisons; earlier comparisons are kept."""
    folder = runs[0].folder
    earlier = folder.read_json(METRICS_FILE) if folder.exists(METRICS_FILE) else {}
    metrics = summarize(results[0], folds)
    metrics["findings"] = [asdict(finding) for finding in fold_findings(metrics)]
    metrics["comparisons"] = earlier.get("comparisons", {}) | {
        str(run.spec.run.name): compare(results[0], other)
        for run, other in zip(runs[1:], results[1:], strict=True)
    }
    metrics["mean"] = earlier.get("mean")
    folder.write_json(METRICS_FILE, metrics)
    return metrics


def _export_mean(
    run: Run, rows: FoldRows, folds: Sequence[Fold], out_of_fold: OutOfFold
) -> dict[str, Any] | None:
    """Write the run folder of the mean model, and return its metrics on the test split, if any."""
    import ray
    from ray.exceptions import RayError

    from ray_jobs.cross_validate.export_mean import export_mean
    from ray_jobs.evaluate.job import evaluate_split
    from ray_jobs.train.metrics import choose_threshold

    spec, train, folder = run.spec, run.spec.train, run.folder / MEAN
    if not folder.exists(SUMMARY):
        label_N, weight_N = out_of_fold.label_N, out_of_fold.weight_N
        probability_N = out_of_fold.probability_RN.mean(axis=0)
        threshold = choose_threshold(label_N, probability_N, train.decision_threshold, weight_N)
        write_validation(folder, label_N, probability_N, weight_N)
        write_reference(folder, Folder(spec.data.prepared), run.manifest)
        summary = {"run": MEAN, "num_models": len(folds), "decision_threshold": threshold}
        export = ray.remote(export_mean).options(num_cpus=train.cpus_per_worker)
        models = [run_folder(_fold_spec(run, fold)) for fold in folds]
        try:
            ray.get(export.remote(rows, models, folder, summary, train.cpus_per_worker))
        except RayError as error:
            raise JobError(f"the mean model could not be written: {root_cause(error)}") from error
    if not run.manifest.splits["test"].num_rows:
        return None
    job = EvaluateSpec(
        run=str(folder),
        data=spec.data.prepared,
        output=str(folder / "evaluation"),
        use_gpu=train.use_gpu,
        cpus_per_worker=train.cpus_per_worker,
        address=spec.run.address,
    )
    return evaluate_split(job).metrics


def _print_fold(spec: RunSpec) -> None:
    folder = run_folder(spec)
    summary = folder.read_json(SUMMARY)
    print(
        f"  fold {spec.run.name}: {count_text(summary['epochs'], 'epoch')}, validation log loss "
        f"{summary['validation']['log_loss']:.4f}, {summary['train_s']:.0f} s",
        flush=True,
    )


def _print(run: Run, metrics: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    counts = metrics["class_counts"]
    console.print(
        f"[bold]{escape(str(run.spec.run.name))}[/bold]: {count_text(metrics['num_rows'], 'row')}, "
        f"{counts[1]:,} of them {escape(repr(run.manifest.positive_label))}, each predicted by "
        "models that were not trained on it"
    )
    table = Table()
    table.add_column("metric")
    for column in ("value", "95 % interval", "mean of folds", "deviation"):
        table.add_column(column, justify="right")
    for name in METRICS:
        values = metrics["metrics"][name]
        interval = "–" if values["low"] is None else _interval(values, "{:.4f}")
        table.add_row(
            name,
            _number(values["value"]),
            interval,
            _number(values["mean_of_folds"]),
            _number(values["std_of_folds"]),
        )
    console.print(table)
    for other, compared in metrics["comparisons"].items():
        console.print(f"  compared with [bold]{escape(other)}[/bold]:")
        for name, values in compared.items():
            if values["low"] is not None:
                console.print(
                    f"    {name} {values['difference']:+.4f} (95 % interval "
                    f"{_interval(values, '{:+.4f}')}): {values['verdict']}"
                )
    if (mean := metrics["mean"]) is not None:
        console.print(
            f"  mean of {count_text(len(metrics['folds']), 'model')} on "
            f"{count_text(mean['num_rows'], 'test row')}: AUC {_number(mean['roc_auc'])}, log loss "
            f"{_number(mean['log_loss'])} → {escape(str(run.folder / MEAN))}"
        )
    print_findings(Finding(**finding) for finding in metrics["findings"])
    console.print(f"  [green]done[/green] → {escape(str(run.folder))}")


def _interval(values: dict[str, Any], form: str) -> str:
    return f"{form.format(values['low'])} to {form.format(values['high'])}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
