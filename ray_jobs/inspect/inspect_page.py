"""Renders the report and its images as inspect.html, from inspect_page.html.j2."""

import base64
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import filesize

from ray_jobs.config.prepare_spec import SPLITS, Split
from ray_jobs.config.text import NONE, number_text
from ray_jobs.inspect.report_schema import ImagePair, ImageRef, Leakage, NumericColumn, Report
from ray_jobs.pages.page_kit import chart, render

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Images = Mapping[tuple[Split, int, str], bytes]

_MAX_PAIRS = 12


def html(report: Report, images: Images) -> str:
    """Return the page.

    Args:
        report: The report.
        images: Small JPEGs by split, row and column; a placeholder replaces each missing one.
    """
    name = report.prepared.rstrip("/").rpartition("/")[2]
    summaries = report.splits.values()
    sheet: dict[tuple[Split, int], dict[int, dict[str, ImageRef]]] = {}
    for image in report.contact_sheet:
        rows = sheet.setdefault((image.split, image.label), {})
        rows.setdefault(image.row, {})[image.column] = image
    return render(
        "inspect/inspect_page.html.j2",
        title=f"Inspection of {report.prepared}",
        report=report,
        name=name,
        store=report.store,
        image_names=[column.partition("_")[2] for column in report.store.columns],
        splits=SPLITS,
        num_rows=sum(summary.num_rows for summary in summaries),
        num_bytes=sum(summary.num_bytes for summary in summaries),
        num_shards=sum(summary.num_shards for summary in summaries),
        size_text=filesize.decimal,
        p_text=_p_text,
        histogram=lambda column: chart(_histogram(column), f"Distribution of {column.column}", 150),
        leaks=sorted(report.columns, key=lambda column: -_strength(column.leak)),
        shown_pairs=_shown_pairs,
        # A row without an image of a column shows a placeholder.
        sheet={
            group: [[row.get(name) for name in report.store.columns] for row in rows.values()]
            for group, rows in sheet.items()
        },
        source=lambda image: _source(image, images),
    )


def shown_images(report: Report) -> list[ImageRef]:
    """Return the images that the page shows."""
    pairs = [pair for o in report.duplicates.overlaps for pair in _shown_pairs(o.examples)]
    return [
        *report.contact_sheet,
        *(image for column in report.images for image in column.examples),
        *(image for pair in pairs for image in (pair.first, pair.second)),
    ]


def _histogram(column: NumericColumn) -> "Figure | None":
    """Return the fraction of each split per bin: an area for training, lines for the others."""
    from plotly.graph_objects import Figure

    if len(column.edges) < 2:
        return None
    edges = [number_text(edge) for edge in column.edges]
    bins = [f"{low} to {high}" for low, high in itertools.pairwise(edges)]
    figure = Figure()
    for split in SPLITS:
        counts = column.splits[split].histogram
        fractions = [count / max(sum(counts), 1) for count in counts]
        figure.add_scatter(
            x=column.edges,
            # The last bin needs a point at both of its edges.
            y=[*fractions, fractions[-1]],
            name=split,
            mode="lines",
            line={"shape": "hv", "color": f"var(--{split})", "width": 1.8},
            fill="tozeroy" if split == "train" else None,
            text=[*bins, bins[-1]],
            hovertemplate=f"{split}, %{{text}}: %{{y:.1%}}<extra></extra>",
        )
    figure.update_layout(showlegend=False, hovermode="x")
    figure.update_yaxes(tickformat=".0%", nticks=4, rangemode="tozero")
    return figure


def _strength(leak: Leakage) -> float:
    aucs = [auc for auc in (leak.auc, leak.missing_auc) if auc is not None]
    return max((abs(auc - 0.5) for auc in aucs), default=0.0)


def _shown_pairs(pairs: Sequence[ImagePair]) -> list[ImagePair]:
    """Return the pairs to show: a few exact duplicates, then those that need a look."""
    exact = [pair for pair in pairs if pair.exact][: _MAX_PAIRS // 3]
    return exact + [pair for pair in pairs if not pair.exact][: _MAX_PAIRS - len(exact)]


def _source(image: ImageRef, images: Images) -> str | None:
    """Return the data URI of an image, or None for a missing one."""
    content = images.get((image.split, image.row, image.column))
    if content is None:
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"


def _p_text(p_value: float | None) -> str:
    if p_value is None:
        return NONE
    return "< 0.0001" if p_value < 1e-4 else f"{p_value:.4f}"
