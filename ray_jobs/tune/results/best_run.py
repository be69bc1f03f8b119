"""Finalizes a search: trains the best trials in full, evaluates them and writes the results.

Input: a search whose trials have ended. Output: leaderboard.csv, best.yaml, tune.html and
summary.json in the search folder, and the run folder of the best trial.
"""

import json
from dataclasses import asdict
from typing import Any

from ray_jobs.config.inference_spec import EvaluateSpec
from ray_jobs.config.spec import RunSpec
from ray_jobs.config.text import count_text
from ray_jobs.config.tune_spec import EXPLOITING
from ray_jobs.data.manifest import read_manifest
from ray_jobs.storage.folder import Folder
from ray_jobs.train.checkpoints.checkpoint_manager import CheckpointManager
from ray_jobs.train.finalize import SUMMARY
from ray_jobs.train.job import run_folder
from ray_jobs.train.telemetry.history_keys import HISTORY, sort_key
from ray_jobs.tune.results.leaderboard import leaderboard_table, write_leaderboard
from ray_jobs.tune.results.search_state import Comparison, Search, TrialRow
from ray_jobs.tune.run_trials import TRIALS
from ray_jobs.tune.search.space import Space
from ray_jobs.tune.trials.trial_checkpoints import delete_checkpoints, newest_checkpoint

BEST = "best.yaml"
PAGE = "tune.html"
EVALUATIONS = "evaluation"
IN_FULL = "full"
"""Folder of the full training runs that follow trials on features."""


def finalize_search(
    spec: RunSpec, space: Space, folder: Folder, search: Search, on_features: bool
) -> dict[str, Any]:
    """Train the best and the untuned trials in full, evaluate them, and return the summary.

    The best trial is chosen on the validation rows alone and evaluated on the test rows.

    Args:
        spec: Spec of the search.
        space: Search space.
        folder: Search folder.
        search: Search whose trials have ended.
        on_features: Whether trials trained on features. If so, or if they trained on folds, the
            best trials are trained from the start, on images and the training split; otherwise
            they continue from their checkpoints.

    Raises:
        JobError: If a training run or an evaluation fails.
    """
    import yaml

    from ray_jobs.train.job import fit

    from_start = on_features or spec.tune.folds is not None
    untuned = search.trials[0]
    ranked = [row for row in search.ranked() if row.scores]
    chosen = ranked[: spec.tune.promote if on_features else 1]
    runs = {}
    for row in [*chosen, *([untuned] if untuned.scores and untuned not in chosen else [])]:
        runs[row.name] = _train_in_full(spec, space, folder, row, from_start)
        if on_features:
            row.scores_in_full = _best_scores(runs[row.name], search)
    best = chosen[0]
    if on_features:
        metric = search.objectives[0]
        # Includes the untuned trial, which can be the best one.
        candidates = [row for row in search.trials if row.scores_in_full]
        best = min(candidates, key=lambda row: sort_key(metric, row.scores_in_full.get(metric)))
    best_spec = runs[best.name]
    # best.yaml describes a run of its own, in the folder that contains the search.
    own = best_spec.overlay(
        {"run.name": f"{search.name}-best", "run.storage_path": spec.run.storage_path}
    )
    folder.write_text(BEST, yaml.safe_dump(own.model_dump(mode="json"), sort_keys=False))
    untuned_run = runs.get(untuned.name)
    if spec.tune.scheduler in EXPLOITING:
        # The scheduler has changed the values of the first trial.
        place = {"run.name": "untuned", "run.storage_path": (folder / IN_FULL).uri}
        untuned_run = space.base.overlay(place)
        fit(untuned_run)
    search.comparison = _compare(spec, folder, best_spec, untuned_run)
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
        "trials": search.count_states(),
        "spent": search.spent,
        "test": asdict(search.comparison) if search.comparison else None,
    }
    folder.write_json(SUMMARY, summary)
    _print(summary, search, folder)
    return summary


def write_results(search: Search, folder: Folder) -> None:
    """Write the leaderboard and the page of a search in its current state."""
    from ray_jobs.tune.results.tune_page import html

    write_leaderboard(search, folder)
    folder.write_text(PAGE, html(search))


def _train_in_full(
    spec: RunSpec, space: Space, folder: Folder, row: TrialRow, from_start: bool
) -> RunSpec:
    """Train a trial in full and return the spec of the run."""
    from ray_jobs.train.job import begin_run, fit

    trial = folder / TRIALS / row.name
    run = space.spec_of(row.values).overlay(
        {
            "run.name": row.name,
            "run.storage_path": (folder / (IN_FULL if from_start else TRIALS)).uri,
            "train.num_workers": spec.train.num_workers,
        }
    )
    if not from_start and not CheckpointManager(trial).steps():
        # PBT may have changed the values since the trial started.
        begin_run(run, read_manifest(Folder(run.data.prepared)), trial)
        checkpoint = newest_checkpoint(trial)
        # In order, with the state last: a checkpoint without its state is incomplete.
        if checkpoint is not None:
            for name in checkpoint[0].names():
                trial.write_bytes(name, checkpoint[0].read_bytes(name))
    fit(run)
    return run


def _best_scores(run: RunSpec, search: Search) -> dict[str, float]:
    """Return the values of the objectives at the best epoch of a finished run."""
    folder = run_folder(run)
    lines = folder.read_bytes(HISTORY).decode().splitlines()
    best = json.loads(lines[folder.read_json(SUMMARY)["best_epoch"] - 1])
    return {name: best[name] for name in search.objectives if best.get(name) is not None}


def _compare(
    spec: RunSpec, folder: Folder, best: RunSpec, untuned: RunSpec | None
) -> Comparison | None:
    """Evaluate the best and the untuned run on the test rows.

    Returns:
        The comparison, or None if the test rows have only one class or there is no untuned run.
    """
    from ray_jobs.evaluate.job import Evaluation, evaluate_split
    from ray_jobs.evaluate.uncertainty.draw_metrics import DrawMetrics
    from ray_jobs.evaluate.uncertainty.model_comparison import COMPARED, Statistics, compare

    def evaluate(run: RunSpec, name: str) -> Evaluation:
        job = EvaluateSpec(
            run=str(run_folder(run)),
            data=spec.data.prepared,
            output=str(folder / EVALUATIONS / name),
            baselines=False,
            explain="none",
            use_gpu=spec.train.use_gpu,
            cpus_per_worker=spec.train.cpus_per_worker,
            address=spec.run.address,
        )
        return evaluate_split(job)

    test = read_manifest(Folder(spec.data.prepared)).splits["test"]
    if not all(test.class_counts):
        return None
    ours = evaluate(best, "best")
    if untuned is None:
        return None
    same = run_folder(untuned).uri == run_folder(best).uri
    theirs = ours if same else evaluate(untuned, "untuned")

    def statistics(found: Evaluation) -> Statistics:
        rows, threshold = found.rows, found.metrics["threshold"]
        return DrawMetrics(rows.label_N, rows.probability_N, threshold, rows.weight_N, COMPARED).of

    rows = ours.rows
    others = {"untuned": statistics(theirs)}
    gain = compare(statistics(ours), others, rows.label_N, rows.group_N)["untuned"]["roc_auc"]
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

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        # A log has no width, so names need not be cut.
        console.width = 160
    console.print(leaderboard_table(search))
    test = search.comparison
    if test is not None:
        rows = count_text(test.num_rows, "test row")
        if test.same:
            text = f"no trial was better than the untuned model: AUC {test.best:.4f} on {rows}"
        else:
            noise = "; the gain is within the noise" if test.low <= 0 <= test.high else ""
            text = (
                f"on {rows}: AUC {test.best:.4f}, untuned {test.untuned:.4f}; gain "
                f"{test.best - test.untuned:+.4f} (95 % interval {test.low:+.4f} to "
                f"{test.high:+.4f}){noise}"
            )
        console.print(f"  {text}")
    console.print(f"  best run: {escape(summary['run'])}")
    console.print(f"  [green]done[/green] → {escape(str(folder))}")
