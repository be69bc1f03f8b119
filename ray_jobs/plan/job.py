"""Estimate memory, time and cost of a run before you rent machines.

Reads a specification, the manifest of prepared data if there is one, and a table of machines and
prices (ray_jobs/plan/gpus.yaml or a copy). Prints tables, and writes JSON with --output.

Run:   python -m ray_jobs.plan ray_jobs/specs/houses.yaml --gpu a10g --workers 8

Reports memory per GPU, step time, feed throughput, network traffic, scaling efficiency, wall time
and cost; ray_jobs/plan/estimate.py has the formulas and their sources. If the run does not fit in
memory, the job suggests settings that fit and exits with status 1.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import MANIFEST, read_manifest
from ray_jobs.plan.plan_spec import PlanSpec
from ray_jobs.storage.folder import Folder

if TYPE_CHECKING:
    from rich.table import Table

    from ray_jobs.plan.estimate import Plan, StagePlan

_MAX_COMPARED = 6
"""Maximum number of rows in the table of worker counts."""


def plan(spec: PlanSpec) -> "Plan":
    """Print the estimates for a run and return them.

    Raises:
        JobError: If the run does not fit in memory, or is impossible for another reason.
    """
    from ray_jobs.plan.estimate import Estimator
    from ray_jobs.plan.layer_costs import model_costs, planned_manifest
    from ray_jobs.plan.suggestions import suggestions

    run, folder, machine = spec.run_spec(), Folder(spec.data.prepared), spec.machine()
    if folder.exists(MANIFEST):
        manifest = read_manifest(folder)
    else:
        manifest = planned_manifest(run, spec.rows, spec.numbers)

    def build(of: RunSpec) -> Estimator:
        return Estimator(of, spec.gpu.lower(), machine, model_costs(of, manifest), manifest)

    estimator = build(run)
    found = estimator.plan()
    suggested = [] if found.fits else suggestions(estimator, build)
    others = [replace(estimator, spec=other).plan() for other in _other_worker_counts(run)]
    _print(found, others)
    if spec.output:
        tree = {
            **found.model_dump(mode="json"),
            "fits": found.fits,
            "other_workers": [other.model_dump(mode="json") for other in others],
            "remedies": [suggestion.changes for suggestion in suggested],
        }
        Path(spec.output).write_text(json.dumps(tree, indent=1) + "\n")
    if not found.fits:
        raise JobError(_memory_error(found, [suggestion.text for suggestion in suggested]))
    return found


def _other_worker_counts(run: RunSpec) -> list[RunSpec]:
    """Return the run with the nearest worker counts, by ratio, that its global batch allows."""
    own, counts = run.train.workers_range[1], run.train.allowed_workers()
    nearest = sorted(counts, key=lambda n: max(n / own, own / n))[:_MAX_COMPARED]
    runs = []
    for count in sorted(nearest):
        with suppress(ValueError):  # Some settings are valid for one worker only.
            runs.append(run.overlay({"train.num_workers": count}))
    return runs


def _memory_error(found: "Plan", suggested: Sequence[str]) -> str:
    memory = found.peak_memory
    text = (
        f"a replica needs {_size(memory.total)} of memory for {found.rows_per_replica} rows per "
        f"step, but {found.gpu} ({found.instance}) has {_size(memory.capacity)}"
    )
    if not suggested:
        return f"{text}; not even one row fits: choose another --gpu or a smaller model"
    return "\n".join([f"{text}; it fits with", *(f"  {line}" for line in suggested)])


# -- on the terminal ------------------------------------------------------------------------------


def _print(found: "Plan", others: Sequence["Plan"]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    replicas = f", {found.num_replicas} GPUs" if found.num_replicas != found.num_workers else ""
    console.print(
        f"[bold]{found.num_workers} × {escape(found.gpu)}[/bold]: {found.num_machines} × "
        f"{escape(found.instance)}{replicas}, {found.rows_per_replica} rows per step on each, "
        f"{found.precision}; {found.num_weights / 1e6:,.1f} million weights, "
        f"{found.forward_flops / 1e9:,.2f} GFLOP forward per row, {found.num_rows:,} training rows",
        soft_wrap=True,
    )
    console.print(_stage_table(found))
    console.print(_worker_table(found, others))
    for warning in found.warnings:
        console.print(f"[bold yellow]![/bold yellow] {escape(warning)}", soft_wrap=True)
    if found.fits:
        console.print(
            f"[green]fits[/green]: at most {_duration(found.wall_s)}, {_price(found, 'on_demand')} "
            f"on demand, {_price(found, 'spot')} spot",
            soft_wrap=True,
        )


def _stage_table(found: "Plan") -> "Table":
    from rich.table import Table

    table = Table("per replica")
    for i, stage in enumerate(found.stages, 1):
        name = "" if len(found.stages) == 1 else f"stage {i}, {stage.epochs} epochs"
        table.add_column(name, justify="right")

    def add(name: str, text: Any) -> None:
        table.add_row(name, *(text(stage) for stage in found.stages))

    def total(stage: "StagePlan") -> str:
        memory = stage.memory
        colour = "green" if memory.fits else "bold red"
        return f"[{colour}]{_size(memory.total)}[/{colour}] of {_size(memory.capacity)}"

    add("trainable weights", lambda s: f"{s.num_learning / 1e6:,.1f} M")
    add("memory", total)
    for part in ("weights", "gradients", "optimizer", "activations", "batches", "reserved"):
        add(f"  {part}", lambda s, part=part: _size(getattr(s.memory, part)))
    add("step", lambda s: _seconds(s.step_s))
    add("  compute", lambda s: _seconds(s.compute_s))
    add("  exchange", lambda s: f"{s.exchange_bytes / 1e6:,.0f} MB sent, {_seconds(s.exchange_s)}")
    add("feed of all workers", lambda s: f"{s.rows_per_s:,.0f} rows/s")
    add("  cores per worker", lambda s: f"{s.feed_cores:.1f}")
    return table


def _worker_table(found: "Plan", others: Sequence["Plan"]) -> "Table":
    from rich.table import Table

    table = Table("workers")
    for name in ("step", "scaling", "memory", "at most", "on demand", "spot"):
        table.add_column(name, justify="right")
    for other in others:
        memory = _size(other.peak_memory.total)
        table.add_row(
            str(other.num_workers),
            _seconds(other.stages[-1].step_s),
            f"{other.stages[-1].efficiency:.0%}",
            memory if other.fits else f"[red]{memory}[/red]",
            _duration(other.wall_s),
            _price(other, "on_demand"),
            _price(other, "spot"),
            style="bold" if other.num_workers == found.num_workers else None,
        )
    return table


def _size(num_bytes: float) -> str:
    gib = num_bytes / 2**30
    return f"{gib:,.2f} GiB" if gib >= 0.1 else f"{gib * 1024:,.1f} MiB"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min"


def _price(found: "Plan", kind: str) -> str:
    return f"${found.usd[kind]:,.2f}" if kind in found.usd else "–"
