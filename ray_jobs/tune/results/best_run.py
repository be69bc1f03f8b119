"""From a search's trials to its results: the best trained in full, evaluated, and written down.

Enters: the search as it stands.  Leaves: leaderboard.csv, best.yaml, tune.html and summary.json in
the search folder, and the run folder of the best.
"""

import csv
import io
import json
from dataclasses import asdict
from typing import Any

from ray_jobs.config.spec import EvaluateSpec, RunSpec
from ray_jobs.config.tune_spec import EXPLOITING
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager
from ray_jobs.train.finalize import SUMMARY
from ray_jobs.train.job import run_folder
from ray_jobs.train.telemetry.console import HISTORY
from ray_jobs.tune.results.search_state import PARTS, Comparison, Search, TrialRow
from ray_jobs.tune.run_trials import TRIALS
from ray_jobs.tune.search.space import Space
from ray_jobs.tune.trials.trial_checkpoints import delete_checkpoints, newest_checkpoint

LEADERBOARD = "leaderboard.csv"
BEST = "best.yaml"
PAGE = "tune.html"
EVALUATIONS = "evaluation"
IN_FULL = "full"
"""Folder of the runs that trials on features went on to."""

_BOOTSTRAP_DRAWS = 2_000


def finish_search(
    spec: RunSpec, space: Space, folder: Folder, search: Search, on_features: bool
) -> dict[str, Any]:
    """Train the best trials and the untuned one to their ends, evaluate, and sum up.

    Which one is best is decided on validation rows alone; the test rows come after.

    Args:
        spec: of the search.
        space: of it.
        folder: of it.
        search: whose trials are done.
        on_features: whether they saw features: then the best ones are trained from the beginning,
            on images and with all that the spec says; else they go on from where they were.

    Raises:
        JobError: if a training or an evaluation fails.
    """
    import yaml

    untuned = search.trials[0]
    ranked = [row for row in search.ranked() if row.scores]
    chosen = ranked[: spec.tune.promote if on_features else 1]
    runs = {}
    for row in [*chosen, *([untuned] if untuned.scores and untuned not in chosen else [])]:
        runs[row.name] = _trained(spec, space, folder, row, on_features)
        if on_features:
            row.scores_in_full = _scores(runs[row.name], search)
    best = chosen[0]
    if on_features:
        first = search.objectives[0]
        # The untuned one, too, is a choice where no other one is better.
        every = [row for row in search.trials if row.scores_in_full]
        best = min(every, key=lambda row: first.rank(row.scores_in_full.get(first.metric)))
    best_spec = runs[best.name]
    # As a run of its own beside the search, which is there already.
    own = best_spec.overlay(
        {"run.name": f"{search.name}-best", "run.storage_path": spec.run.storage_path}
    )
    folder.write_text(BEST, yaml.safe_dump(own.model_dump(mode="json"), sort_keys=False))
    untuned_run = runs.get(untuned.name)
    if spec.tune.scheduler in EXPLOITING:
        # The first trial has had other values since.
        untuned_run = _trained_untuned(spec, space, folder)
    search.comparison = _compared(spec, folder, best_spec, untuned_run)
    write_results(search, folder)
    for row in search.trials:
        delete_checkpoints(folder / TRIALS / row.name)
    summary = {
        "search": search.name,
        "best_trial": best.name,
        "values": best.values,
        "scores": best.scores_in_full or best.scores,
        "run": str(run_folder(best_spec)),
        "untuned_scores": untuned.scores_in_full or untuned.scores,
        "trials": {state: sum(r.state == state for r in search.trials) for state in _ENDS},
        "spent": search.spent,
        "test": asdict(search.comparison) if search.comparison else None,
    }
    folder.write_json(SUMMARY, summary)
    _print(summary, search, folder)
    return summary


_ENDS = ("finished", "stopped", "failed")


def write_results(search: Search, folder: Folder) -> None:
    """Write leaderboard and page of a search as it stands."""
    from ray_jobs.tune.results.tune_page import html

    folder.write_text(LEADERBOARD, leaderboard(search))
    folder.write_text(PAGE, html(search))


def leaderboard(search: Search) -> str:
    """Return the trials as CSV, the best first."""
    metrics = [objective.metric for objective in search.objectives]
    paths = list(dict.fromkeys(path for row in search.trials for path in row.values))
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    seconds = [f"{part}_s" for part in PARTS]
    in_full = [f"{metric} in full" for metric in metrics]
    writer.writerow(
        [
            "rank",
            "trial",
            "state",
            *metrics,
            *in_full,
            "epochs",
            "best_epoch",
            *seconds,
            *paths,
            "error",
        ]
    )
    for rank, row in enumerate(search.ranked(), start=1):
        writer.writerow(
            [
                rank,
                row.name,
                row.state,
                *(row.scores.get(metric, "") for metric in metrics),
                *(row.scores_in_full.get(metric, "") for metric in metrics),
                row.epochs,
                "" if row.best_epoch is None else row.best_epoch + 1,
                *(round(row.seconds.get(part, 0.0), 3) for part in PARTS),
                *(row.values.get(path, "") for path in paths),
                row.error or "",
            ]
        )
    return stream.getvalue()


def _trained(
    spec: RunSpec, space: Space, folder: Folder, row: TrialRow, on_features: bool
) -> RunSpec:
    """Let `train` bring a trial to its end, and return the spec of that run."""
    from ray_jobs.train.job import begin_run, fit

    trial = folder / TRIALS / row.name
    run = space.spec_of(row.values).overlay(
        {
            "run.name": row.name,
            "run.storage_path": (folder / (IN_FULL if on_features else TRIALS)).uri,
            "train.num_workers": spec.train.num_workers,
        }
    )
    if not on_features and not CheckpointManager(trial).steps():
        # PBT has changed its values since it began.
        begin_run(run, read_manifest(Folder(run.data.prepared)), trial)
        checkpoint = newest_checkpoint(trial)
        # In their order, a step's state last: without it there is no checkpoint yet.
        if checkpoint is not None:
            for name in checkpoint.names():
                trial.write_bytes(name, checkpoint.read_bytes(name))
    fit(run)
    return run


def _trained_untuned(spec: RunSpec, space: Space, folder: Folder) -> RunSpec:
    """Let `train` train what the specification says, and return the spec of that run."""
    from ray_jobs.train.job import fit

    run = space.base.overlay({"run.name": "untuned", "run.storage_path": (folder / IN_FULL).uri})
    fit(run)
    return run


def _scores(run: RunSpec, search: Search) -> dict[str, float]:
    """Return what a training in full reached in the objectives, at its best epoch."""
    folder = run_folder(run)
    lines = folder.read_bytes(HISTORY).decode().splitlines()
    best = json.loads(lines[folder.read_json(SUMMARY)["best_epoch"] - 1])
    return {o.metric: best[o.metric] for o in search.objectives if best.get(o.metric) is not None}


def _compared(
    spec: RunSpec, folder: Folder, best: RunSpec, untuned: RunSpec | None
) -> Comparison | None:
    """Evaluate the best run and the untuned one on the test rows; None where that says nothing."""
    from ray_jobs.evaluate.job import Evaluation, evaluation
    from ray_jobs.train.metrics import auc_gain

    def evaluated(run: RunSpec, name: str) -> Evaluation:
        job = EvaluateSpec(
            run=str(run_folder(run)),
            data=spec.data.prepared,
            output=str(folder / EVALUATIONS / name),
            use_gpu=spec.train.use_gpu,
            cpus_per_worker=spec.train.cpus_per_worker,
            address=spec.run.address,
        )
        return evaluation(job)

    test = read_manifest(Folder(spec.data.prepared)).splits["test"]
    if not all(test.class_counts):
        return None
    ours = evaluated(best, "best")
    if untuned is None:
        return None
    same = run_folder(untuned).uri == run_folder(best).uri
    theirs = ours if same else evaluated(untuned, "untuned")
    gain = auc_gain(ours.label, ours.probability, theirs.probability, _BOOTSTRAP_DRAWS)
    return Comparison(
        metric="roc_auc",
        untuned=theirs.metrics["roc_auc"],
        best=ours.metrics["roc_auc"],
        low=gain["low"],
        high=gain["high"],
        num_rows=test.num_rows,
        same=same,
    )


def _print(summary: dict[str, Any], search: Search, folder: Folder) -> None:
    from rich.console import Console
    from rich.markup import escape

    from ray_jobs.tune.results.leaderboard import table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        # A log has no width, and names should not be cut.
        console.width = 160
    console.print(table(search))
    test = search.comparison
    if test is not None and test.same:
        console.print(
            f"  no trial was better than the specification's own values: AUC {test.best:.4f} on "
            f"{test.num_rows:,} test rows"
        )
    elif test is not None:
        noise = ", which is within the noise" if test.low <= 0 <= test.high else ""
        console.print(
            f"  on {test.num_rows:,} test rows: AUC {test.best:.4f}, untuned {test.untuned:.4f}; "
            f"gain {test.best - test.untuned:+.4f} (95 % interval {test.low:+.4f} to "
            f"{test.high:+.4f}){noise}"
        )
    console.print(f"  best run: {escape(summary['run'])}")
    console.print(f"  [green]done[/green] → {escape(str(folder))}")
