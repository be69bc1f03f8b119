"""Estimate what a run takes on some machines, before any of them is rented.

Reads: a specification; the manifest of prepared data, where there is one; a table of machines and
prices, ray_jobs/plan/gpus.yaml or a copy of it.  Writes: to the terminal, and JSON where asked.
Run:   python -m ray_jobs.plan ray_jobs/specs/houses.yaml --gpu a10g --workers 8

Said are memory of each GPU, step time, what the feed needs, what is exchanged, scaling efficiency,
wall time and cost; ray_jobs/plan/estimate.py has the formulas and where they are from. A run
that does not fit in memory ends with status 1, and says what would.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import NAME, Manifest, read_manifest
from ray_jobs.plan.plan_spec import PlanSpec
from ray_jobs.storage.folder import Folder

if TYPE_CHECKING:
    from rich.table import Table

    from ray_jobs.plan.estimate import Estimator, Plan, StagePlan

_NUMBERS_SHOWN = 6
"""Numbers of workers that are set side by side."""


def plan(spec: PlanSpec) -> "Plan":
    """Print what a run takes, and return it.

    Raises:
        JobError: if it does not fit in memory, or cannot be at all.
    """
    from ray_jobs.plan.suggestions import suggestions

    run, manifest = spec.run_spec(), _manifest(spec)
    estimator = _estimator(spec, run, manifest)
    found = estimator.plan(run)
    ways = (
        [] if found.fits else suggestions(run, estimator, lambda r: _estimator(spec, r, manifest))
    )
    others = [estimator.plan(other) for other in _other_numbers(run)]
    _print(found, others)
    if spec.output:
        tree = {
            **found.model_dump(mode="json"),
            "fits": found.fits,
            "other_workers": [other.model_dump(mode="json") for other in others],
            "suggestions": [way.changes for way in ways],
        }
        Path(spec.output).write_text(json.dumps(tree, indent=1) + "\n")
    if not found.fits:
        raise JobError(_does_not_fit(found, [way.text for way in ways]))
    return found


def _manifest(spec: PlanSpec) -> Manifest:
    """Return the manifest of the prepared data, or one as it may be."""
    from ray_jobs.plan.layer_costs import planned_manifest

    folder = Folder(spec.data.prepared)
    if folder.exists(NAME):
        return read_manifest(folder)
    return planned_manifest(spec.run_spec(), spec.rows, spec.numbers)


def _estimator(spec: PlanSpec, run: RunSpec, manifest: Manifest) -> "Estimator":
    from ray_jobs.plan.estimate import Estimator
    from ray_jobs.plan.layer_costs import model_costs

    return Estimator(spec.known_gpu(), spec.machine(), model_costs(run, manifest), manifest)


def _other_numbers(run: RunSpec) -> list[RunSpec]:
    """Return the run with other numbers of workers, which its global batch allows."""
    own, numbers = run.train.workers_range[1], run.train.allowed_workers()
    # The nearest ones by their ratio.
    near = sorted(numbers, key=lambda n: max(n / own, own / n))[:_NUMBERS_SHOWN]
    found = []
    for number in sorted(near):
        with suppress(ValueError):  # What one worker may do, several may not.
            found.append(run.overlay({"train.num_workers": number}))
    return found


def _does_not_fit(found: "Plan", ways: Sequence[str]) -> str:
    memory = found.fullest
    text = (
        f"a replica needs {_size(memory.total)} of memory for {found.rows_per_replica} rows a "
        f"step, and {found.gpu} ({found.instance}) has {_size(memory.capacity)}"
    )
    if not ways:
        return f"{text}; not even one row fits: choose another --gpu or a smaller model"
    return "\n".join([f"{text}; it fits with", *(f"  {way}" for way in ways)])


# -- on the terminal ------------------------------------------------------------------------------


def _print(found: "Plan", others: Sequence["Plan"]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    replicas = f", {found.num_replicas} GPUs" if found.num_replicas != found.num_workers else ""
    console.print(
        f"[bold]{found.num_workers} × {escape(found.gpu)}[/bold]: {found.num_machines} × "
        f"{escape(found.instance)}{replicas}, {found.rows_per_replica} rows a step on each, "
        f"{found.precision}; {found.num_weights / 1e6:,.1f} million weights, "
        f"{found.forward_flops / 1e9:,.2f} GFLOP forward a row, {found.num_rows:,} training rows",
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

    table = Table("of each replica")
    for i, stage in enumerate(found.stages, 1):
        name = "" if len(found.stages) == 1 else f"stage {i}, {stage.epochs} epochs"
        table.add_column(name, justify="right")

    def add(name: str, of: Any) -> None:
        table.add_row(name, *(of(stage) for stage in found.stages))

    def total(stage: "StagePlan") -> str:
        memory = stage.memory
        colour = "green" if memory.fits else "bold red"
        return f"[{colour}]{_size(memory.total)}[/{colour}] of {_size(memory.capacity)}"

    add("weights that learn", lambda s: f"{s.num_learning / 1e6:,.1f} M")
    add("memory", total)
    for part in ("weights", "gradients", "optimizer", "activations", "batches", "reserved"):
        add(f"  {part}", lambda s, part=part: _size(getattr(s.memory, part)))
    add("step", lambda s: _seconds(s.step_s))
    add("  compute", lambda s: _seconds(s.compute_s))
    add(
        "  exchange",
        lambda s: f"{s.exchange_bytes / 1e6:,.0f} MB sent, {_seconds(s.exchange_s)}",
    )
    add("feed of all workers", lambda s: f"{s.rows_per_s:,.0f} rows/s")
    add("  cores of each worker", lambda s: f"{s.feed_cores:.1f}")
    return table


def _worker_table(found: "Plan", others: Sequence["Plan"]) -> "Table":
    from rich.table import Table

    table = Table("workers")
    for name in ("step", "scaling", "memory", "at most", "on demand", "spot"):
        table.add_column(name, justify="right")
    for other in others:
        memory = _size(other.fullest.total)
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
