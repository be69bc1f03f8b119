"""Say what is in prepared data, and what in it deserves a look.

Reads: a folder that `prepare` wrote.  Writes: inspect.html, a page that needs nothing else, and
inspect.json, the same figures for programs.
Run:   python -m ray_jobs.inspect prepared

Shown are counts, each column's distribution and drift between splits, columns that alone predict
the label, images and keys that stand in several splits, odd images, a contact sheet and the
quarantine. Suspicions are no failure: the exit status is 0 once the report is written.
"""

from typing import TYPE_CHECKING

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS, InspectSpec
from ray_jobs.data.manifest import read_manifest, require_shards
from ray_jobs.storage.folder import Folder

if TYPE_CHECKING:
    from rich.table import Table

    from ray_jobs.inspect.facts import Report

HTML, JSON = "inspect.html", "inspect.json"

_COLUMNS_PRINTED = 40


def inspect(spec: InspectSpec) -> "Report":
    """Write the report of a prepared folder and return it.

    Raises:
        JobError: if there is no prepared data, or a part of it is missing or damaged.
    """
    from ray_jobs.inspect.findings import find
    from ray_jobs.inspect.gather import gather, thumbnails
    from ray_jobs.inspect.inspect_page import html, shown_images

    folder = Folder(spec.prepared)
    manifest = read_manifest(folder)
    if manifest.image.features:
        raise JobError(
            f"{folder} holds features in place of images; inspect the data that they are of"
        )
    require_shards(folder, manifest)
    output = Folder(spec.output) if spec.output else folder
    try:
        report = gather(folder, manifest, spec.max_rows)
        report = report.model_copy(update={"findings": find(report)})
        images = thumbnails(folder, manifest, shown_images(report))
    # What pyarrow raises for a damaged file and a missing column.
    except (OSError, KeyError, ValueError) as error:
        raise JobError(
            f"the shards of {folder} cannot be read: {error}; prepare the data again"
        ) from error
    output.write_json(JSON, report.model_dump(mode="json"))
    output.write_text(HTML, html(report, images))
    _print(report, output)
    return report


def _print(report: "Report", output: Folder) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    store = report.store
    images = f"{len(store.columns)} images" if len(store.columns) > 1 else "one image"
    console.print(
        f"[bold]{escape(report.prepared)}[/bold]: {images} a row, {store.width} × {store.height} "
        f"pixels as {store.encoding}, {len(report.numeric)} numbers, "
        f"{len(report.categorical)} categories",
        soft_wrap=True,
    )
    table = Table("split")
    names = (*report.class_names, "rows", "share", "positive", "shards", "MB")
    for name in names:
        table.add_column(escape(name), justify="right")
    for split, facts in report.splits.items():
        positive = "–" if facts.positive_share is None else f"{facts.positive_share:.1%}"
        counts = [f"{n:,}" for n in (*facts.class_counts, facts.num_rows)]
        size = f"{facts.num_bytes / 1e6:,.1f}"
        table.add_row(split, *counts, f"{facts.share:.1%}", positive, f"{facts.num_shards:,}", size)
    console.print(table)
    if report.numeric or report.categorical:
        console.print(_column_table(report))
    if (more := len(report.numeric) + len(report.categorical) - _COLUMNS_PRINTED) > 0:
        console.print(f"  and {more:,} more columns in {HTML}")
    if not report.findings:
        console.print("[green]nothing suspicious found[/green]")
    for finding in report.findings:
        mark = "[bold yellow]![/bold yellow]" if finding.severity == "warning" else "[dim]·[/dim]"
        console.print(f"{mark} {escape(finding.text)}", soft_wrap=True)
    console.print(f"[green]done[/green] → {escape(str(output))}/{HTML}", soft_wrap=True)


def _column_table(report: "Report") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    from ray_jobs.pages.page_kit import number_text

    table = Table("column")
    for name in ("missing", "mean", "std", "PSI val.", "PSI test", "AUC"):
        table.add_column(name, justify="right")
    for facts in (*report.numeric, *report.categorical)[:_COLUMNS_PRINTED]:
        train = facts.splits["train"]
        mean, std = getattr(train, "mean", None), getattr(train, "std", None)
        psi = []
        for split in SPLITS[1:]:
            drift = facts.drift[split]
            text = number_text(drift.psi, 2)
            psi.append(f"[yellow]{text}[/yellow]" if drift.values_drifted else text)
        auc = number_text(facts.leak.auc, 3)
        missing = train.missing / max(train.num_rows, 1)
        table.add_row(
            escape(facts.column),
            f"{missing:.1%}",
            number_text(mean),
            number_text(std),
            *psi,
            f"[yellow]{auc}[/yellow]" if facts.leak.suspect else auc,
        )
    return table
