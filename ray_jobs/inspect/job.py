"""Report what prepared data contains and which problems it has.

Reads: a folder from `prepare`.  Writes: inspect.html (a self-contained page) and inspect.json (the
same numbers, machine-readable).

Run:   python -m ray_jobs.inspect prepared

The report covers row counts; the distribution and drift of each column; columns that predict the
label on their own; duplicate images and keys; black, white and unreadable images; a contact sheet;
and the quarantine. Findings do not fail the job: the exit status is 0 once the report is written.
"""

from typing import TYPE_CHECKING

from ray_jobs.checks.finding import print_findings
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.config.spec import InspectSpec
from ray_jobs.config.text import count_text, number_text, percent_text
from ray_jobs.data.manifest import read_manifest, require_shards
from ray_jobs.storage.folder import Folder

if TYPE_CHECKING:
    from rich.table import Table

    from ray_jobs.inspect.report_schema import Report

HTML, JSON = "inspect.html", "inspect.json"

_MAX_COLUMNS = 40


def inspect(spec: InspectSpec) -> "Report":
    """Write the report of a prepared folder and return it.

    Raises:
        JobError: If the prepared data is missing, incomplete or damaged.
    """
    from ray_jobs.inspect.build_report import build_report
    from ray_jobs.inspect.inspect_page import html, shown_images
    from ray_jobs.inspect.shard_scan import read_thumbnails

    folder = Folder(spec.prepared)
    manifest = read_manifest(folder)
    if manifest.image.features:
        raise JobError(
            f"{folder} holds features, not images; inspect the folder that they were computed from"
        )
    require_shards(folder, manifest)
    output = Folder(spec.output) if spec.output else folder
    try:
        report = build_report(folder, manifest, spec.max_rows)
        images = read_thumbnails(folder, manifest, shown_images(report))
    # pyarrow raises these for a damaged file and a missing column.
    except (OSError, KeyError, ValueError) as error:
        raise JobError(
            f"could not read the shards in {folder}: {error}; run `prepare` again"
        ) from error
    output.write_json(JSON, report.model_dump(mode="json"))
    output.write_text(HTML, html(report, images))
    _print(report, output)
    return report


def _print(report: "Report", output: Folder) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    store = report.store
    console.print(
        f"[bold]{escape(report.prepared)}[/bold]: {count_text(len(store.columns), 'image')} per "
        f"row, {store.width} × {store.height} pixels as {store.encoding}, "
        f"{count_text(len(report.numeric), 'numeric column')}, "
        f"{count_text(len(report.categorical), 'categorical column')}"
    )
    console.print(_split_table(report), soft_wrap=False)
    if report.numeric or report.categorical:
        console.print(_column_table(report), soft_wrap=False)
    if (more := len(report.numeric) + len(report.categorical) - _MAX_COLUMNS) > 0:
        console.print(f"  {count_text(more, 'more column')} in {HTML}")
    if not report.findings:
        console.print("[green]no findings[/green]")
    print_findings(report.findings)
    console.print(f"[green]done[/green] → {escape(str(output))}/{HTML}")


def _split_table(report: "Report") -> "Table":
    table = _table("split", *report.class_names, "rows", "fraction", "positive", "shards", "MB")
    for split, summary in report.splits.items():
        positive = summary.positive_share
        table.add_row(
            split,
            *(f"{count:,}" for count in (*summary.class_counts, summary.num_rows)),
            f"{summary.share:.1%}",
            percent_text(positive),
            f"{summary.num_shards:,}",
            f"{summary.num_bytes / 1e6:,.1f}",
        )
    return table


def _column_table(report: "Report") -> "Table":
    from rich.markup import escape

    table = _table("column", "missing", "mean", "std", "PSI val.", "PSI test", "AUC")
    table.caption = (
        "PSI: drift from the training split; AUC: how well the column alone predicts the label"
    )
    for column in (*report.numeric, *report.categorical)[:_MAX_COLUMNS]:
        train, drifts = column.splits["train"], [column.drift[split] for split in SPLITS[1:]]
        cells = [(number_text(drift.psi, 2), drift.values_drifted) for drift in drifts]
        cells.append((number_text(column.leak.auc, 3), column.leak.suspect))
        table.add_row(
            escape(column.column),
            f"{train.missing / max(train.num_rows, 1):.1%}",
            *(number_text(getattr(train, name, None)) for name in ("mean", "std")),
            *(f"[yellow]{text}[/yellow]" if flagged else text for text, flagged in cells),
        )
    return table


def _table(first: str, *names: str) -> "Table":
    from rich.markup import escape
    from rich.table import Column, Table

    return Table(first, *(Column(escape(name), justify="right") for name in names))
