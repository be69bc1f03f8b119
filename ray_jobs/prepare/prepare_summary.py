"""Prints what `prepare` has done, or would do in a dry run."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ray_jobs.data.manifest import Manifest
from ray_jobs.prepare.columns import describe
from ray_jobs.prepare.findings import QUARANTINE, format_counts
from ray_jobs.prepare.inputs import Inputs
from ray_jobs.prepare.shards.shard_plan import Plan

if TYPE_CHECKING:
    from rich.table import Table


def print_summary(
    title: str, inputs: Inputs, notes: Sequence[str], planned: tuple[Plan, Manifest] | None
) -> None:
    """Print a title, the rows of each split, the notes, and what the columns are.

    Args:
        title: The first line.
        inputs: What was read.
        notes: Lines to print.
        planned: Plan and manifest; None if there are none.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(title)
    if planned:
        plan, manifest = planned
        console.print(_split_table(manifest, plan))
        notes = (*notes, f"splits: {plan.note}", *_row_notes(manifest))
    console.print("\n".join([*notes, *describe(inputs.columns)]))


def _row_notes(manifest: Manifest) -> Iterator[str]:
    """Yield notes on the weights of rows, and unless in a dry run on images and quarantine."""
    if (weights := manifest.splits["train"].class_weights) is not None:
        column, rows = manifest.prepare.weight_column, manifest.splits["train"].num_rows
        yield (
            f"row weights: column {column}; training weight of {manifest.negative_label} "
            f"{weights[0]:.6g}, of {manifest.positive_label} {weights[1]:.6g}, mean "
            f"{sum(weights) / rows:.6g}"
        )
    if manifest.prepare.dry_run:
        return
    if manifest.image.optional:
        counts = [f"{info.num_without_image:,} in {s}" for s, info in manifest.splits.items()]
        yield f"rows without an image, kept: {', '.join(counts)}"
    if manifest.quarantine:
        counts = format_counts(manifest.quarantine)
        yield f"quarantine: {counts} ({manifest.prepare.output}/{QUARANTINE})"


def _split_table(manifest: Manifest, plan: Plan) -> "Table":
    from rich.table import Table

    table = Table("split")
    is_dry = manifest.prepare.dry_run
    facts = () if is_dry else ("shards", "new shards", "MB")
    for label in (manifest.negative_label, manifest.positive_label, "rows", *facts):
        table.add_column(label, justify="right")
    for split, info in manifest.splits.items():
        num_shards = len(info.shards)
        megabytes = sum(shard.num_bytes for shard in info.shards) / 1e6
        facts = (str(num_shards), str(num_shards - len(plan.kept[split])), f"{megabytes:.1f}")
        counts = map(str, (*info.class_counts, info.num_rows))
        table.add_row(split, *counts, *(() if is_dry else facts))
    return table
