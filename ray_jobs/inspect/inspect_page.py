"""Renders the report and its images as inspect.html.

The page follows the reader's light or dark mode and has one column on a phone.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import filesize

from ray_jobs.config.spec import SPLITS, Split
from ray_jobs.config.text import count_text
from ray_jobs.inspect.report_schema import (
    CategoryColumn,
    Drift,
    ImageColumn,
    ImagePair,
    ImageRef,
    Leakage,
    NumericColumn,
    Report,
)
from ray_jobs.pages.page_kit import (
    NONE,
    document,
    escape,
    more_note,
    number_text,
    section,
    share_bar,
    table,
)

Images = Mapping[tuple[Split, int, str], bytes]

_MAX_PAIRS = 12


def html(report: Report, images: Images) -> str:
    """Return the page.

    Args:
        report: The report.
        images: Small JPEGs by split, row and column; a placeholder replaces each missing one.
    """
    parts = [
        *_header(report),
        _rows(report),
        *_columns(report),
        _drift(report),
        _leakage(report),
        *_images(report, images),
        *_duplicates(report, images),
        *_contact_sheet(report, images),
        *_quarantine(report),
        _method(report),
    ]
    return document(f"Inspection of {report.prepared}", parts)


def shown_images(report: Report) -> list[ImageRef]:
    """Return the images that the page shows."""
    pairs = [pair for o in report.duplicates.overlaps for pair in _shown_pairs(o.examples)]
    return [
        *report.contact_sheet,
        *(image for column in report.images for image in column.examples),
        *(image for pair in pairs for image in (pair.first, pair.second)),
    ]


def _header(report: Report) -> Iterator[str]:
    store = report.store
    rows = sum(summary.num_rows for summary in report.splits.values())
    size = sum(summary.num_bytes for summary in report.splits.values())
    shards = sum(summary.num_shards for summary in report.splits.values())
    names = ", ".join(name.partition("_")[2] for name in store.columns)
    images = count_text(len(store.columns), "image") + " per row"
    images += f" ({escape(names)})" * (len(store.columns) > 1)
    name = report.prepared.rstrip("/").rpartition("/")[2]
    yield f"<h1>{escape(name)}</h1><p class='muted'>{escape(report.prepared)}</p>"
    yield (
        f"<p>{count_text(rows, 'row')} in {count_text(shards, 'shard')}, "
        f"{filesize.decimal(size)}. {images}, "
        f"{store.width} × {store.height} pixels, stored as {store.encoding}. "
        f"{count_text(len(report.numeric), 'numeric column')}, "
        f"{count_text(len(report.categorical), 'categorical column')}.</p>"
    )
    if report.findings:
        items = (f"<li class='{f.severity}'>{escape(f.text)}</li>" for f in report.findings)
        yield f"<ul class='findings'>{''.join(items)}</ul>"
    else:
        yield "<p class='card good'>No findings.</p>"


def _rows(report: Report) -> str:
    rows = [
        [
            _split(split),
            f"{summary.num_rows:,}",
            f"{summary.share:.1%}",
            *(f"{count:,}" for count in summary.class_counts),
            _percent(summary.positive_share),
            share_bar(summary.positive_share or 0),
            f"{summary.num_shards:,}",
            filesize.decimal(summary.num_bytes),
        ]
        for split, summary in report.splits.items()
    ]
    classes = map(escape, report.class_names)
    head = ["", "rows", "fraction", *classes, "positive fraction", "", "shards", "size"]
    return section("Rows", table(head, rows))


def _columns(report: Report) -> Iterator[str]:
    if report.numeric:
        yield (
            f"<h2>Numeric columns</h2><p class='muted small'>{_legend()} Fraction of each split "
            "per bin; the outer bins include all values beyond the ends.</p>"
        )
        yield f"<div class='grid'>{''.join(map(_numeric_card, report.numeric))}</div>"
    if report.categorical:
        yield (
            "<h2>Categorical columns</h2><p class='muted small'>The most frequent values of the "
            "training split, with their fraction of each split.</p>"
        )
        yield f"<div class='grid'>{''.join(map(_category_card, report.categorical))}</div>"


def _numeric_card(column: NumericColumn) -> str:
    names = ("mean", "std", "min", "median", "max")
    rows = []
    for split, summary in column.splits.items():
        missing = summary.missing / summary.num_rows if summary.num_rows else None
        values = (number_text(getattr(summary, name)) for name in names)
        rows.append([_split(split), _percent(missing), *values])
    return (
        f"<div class='card'><h3>{escape(column.column)}{_flags(column)}</h3>{_histogram(column)}"
        f"{table(['', 'missing', *names], rows, 'small')}</div>"
    )


def _category_card(column: CategoryColumn) -> str:
    def row(label: str, counts: Iterable[int]) -> list[str]:
        totals = (max(column.splits[split].num_rows, 1) for split in SPLITS)
        shares = (count / total for count, total in zip(counts, totals, strict=True))
        return [label, *map(_shaded_share, shares)]

    splits = [column.splits[split] for split in SPLITS]
    top = splits[0].top
    rows = [row(escape(word) or "(empty)", [s.top[word] for s in splits]) for word in top]
    rows += [
        row(f"<span class='muted'>{kind}</span>", [getattr(s, kind) for s in splits])
        for kind in ("unknown", "missing")
    ]
    return (
        f"<div class='card'><h3>{escape(column.column)}{_flags(column)}</h3>"
        f"{table(['', *map(_split, SPLITS)], rows, 'small words')}"
        f"{more_note(column.num_words - len(top), 'more value')}</div>"
    )


def _flags(column: NumericColumn | CategoryColumn) -> str:
    flags = ["predicts the label"] if column.leak.suspect else []
    flags += [f"{split} drifts" for split, d in column.drift.items() if d.values_drifted]
    flags += [
        f"missing fraction in {s} differs" for s, d in column.drift.items() if d.missing_drifted
    ]
    return "".join(f" <span class='flag small'>· {flag}</span>" for flag in flags)


def _histogram(column: NumericColumn) -> str:
    """Return the distributions over the same bins: an area for training, lines for the others."""
    num_bins = len(column.edges) - 1
    if num_bins < 1:
        return "<p class='muted small'>No values.</p>"
    shares = {
        split: [count / max(sum(summary.histogram), 1) for count in summary.histogram]
        for split, summary in column.splits.items()
    }
    top = max(max(heights) for heights in shares.values()) or 1
    paths = [f"<path class='{split}' d='{_steps(shares[split], top)}'/>" for split in SPLITS]
    first, last = column.edges[0], column.edges[-1]
    if all(edge % 1 == 0.5 for edge in column.edges):
        first, last = first + 0.5, last - 0.5
    return (
        f"<svg viewBox='0 0 {num_bins} 100' preserveAspectRatio='none' role='img' "
        f"aria-label='Distribution of {escape(column.column)}'>{''.join(paths)}</svg>"
        f"<div class='axis'><span>{number_text(first)}</span><span>{number_text(last)}</span></div>"
    )


def _steps(shares: Sequence[float], top: float) -> str:
    heights = [f"{100 - 96 * share / top:.1f}" for share in shares]
    return "M0 100" + "".join(f"V{height}H{i}" for i, height in enumerate(heights, 1)) + "V100"


def _drift(report: Report) -> str:
    rows = []
    for column in report.columns:
        rows.append([f"<b>{escape(column.column)}</b>", "", "", "", ""])
        rows += [[_split(s), *_drift_cells(column.drift[s])] for s in SPLITS[1:]]
    head = ["", "PSI", "KS", "p", "p of missing"]
    return section("Drift from the training split", table(head, rows, "small drift"))


def _drift_cells(drift: Drift) -> list[str]:
    return [
        _flagged(number_text(drift.psi, 3), drift.values_drifted),
        number_text(drift.ks, 3),
        _p_value(drift.p_value),
        _flagged(_p_value(drift.missing_p_value), drift.missing_drifted),
    ]


def _leakage(report: Report) -> str:
    rows = [
        [
            escape(column.column),
            _flagged(number_text(column.leak.auc, 4), column.leak.suspect),
            number_text(column.leak.missing_auc, 4),
        ]
        for column in sorted(report.columns, key=lambda column: -_strength(column.leak))
    ]
    note = (
        "<p class='muted small'>ROC AUC of one column alone: 0.5 is chance; 0 and 1 mean that the "
        "column determines the label.</p>"
    )
    return section("Label leakage", note + table(["", "AUC", "AUC of missing"], rows))


def _strength(leak: Leakage) -> float:
    aucs = [auc for auc in (leak.auc, leak.missing_auc) if auc is not None]
    return max((abs(auc - 0.5) for auc in aucs), default=0.0)


def _images(report: Report, images: Images) -> Iterator[str]:
    yield f"<h2>Images</h2><p class='muted small'>{_legend()} Grey levels from 0 to 255.</p>"
    for column in report.images:
        yield _image_table(column)
        cards = "".join(map(_numeric_card, (column.brightness, column.contrast)))
        yield f"<div class='grid'>{cards}</div>"
        if column.examples:
            figures = "".join(_figure([image], report, images) for image in column.examples)
            yield "<h3 class='caption'>Black, white or single-colour</h3>"
            yield f"<div class='card sheet'>{figures}</div>"


def _image_table(column: ImageColumn) -> str:
    kinds = ("missing", "unreadable", "black", "white", "flat")
    rows = [
        [_split(split), f"{summary.num_rows:,}", *(f"{getattr(summary, k):,}" for k in kinds)]
        for split, summary in column.splits.items()
    ]
    head = ["", "rows", *kinds[:-1], "single-colour"]
    name = escape(column.column)
    return f"<div class='card picture'><h3>{name}</h3>{table(head, rows, 'small')}</div>"


def _duplicates(report: Report, images: Images) -> Iterator[str]:
    duplicates = report.duplicates
    within = ", ".join(f"{split} {count:,}" for split, count in duplicates.within.items())
    rows = [
        [f"{o.second} in {o.first}", f"{o.exact:,}", f"{o.near:,}{'' if o.complete else '+'}"]
        for o in duplicates.overlaps
    ]
    content = f"<p>Same bytes as another image of the same split: {within}.</p>"
    content += table(["", "same bytes", "nearly identical"], rows)
    yield section("Duplicate images", content)
    for overlap in duplicates.overlaps:
        if overlap.examples:
            pairs = (_pair(pair, report, images) for pair in _shown_pairs(overlap.examples))
            yield f"<h3 class='caption'>{overlap.second} and {overlap.first}</h3>"
            yield f"<div class='pairs'>{''.join(pairs)}</div>"


def _shown_pairs(pairs: Sequence[ImagePair]) -> list[ImagePair]:
    """Return the pairs to show: a few exact duplicates, then those that need a look."""
    exact = [pair for pair in pairs if pair.exact][: _MAX_PAIRS // 3]
    return exact + [pair for pair in pairs if not pair.exact][: _MAX_PAIRS - len(exact)]


def _pair(pair: ImagePair, report: Report, images: Images) -> str:
    note = "same bytes" if pair.exact else f"{count_text(pair.distance, 'bit')} of 64 apart"
    if pair.first.label != pair.second.label:
        note += " <span class='flag'>· labels differ</span>"
    figures = "".join(_figure([image], report, images) for image in (pair.first, pair.second))
    return f"<div class='card pair'>{figures}<p class='small muted'>{note}</p></div>"


def _contact_sheet(report: Report, images: Images) -> Iterator[str]:
    yield "<h2>Contact sheet</h2><p class='muted small'>Rows chosen by hash of their keys.</p>"
    names = report.store.columns
    groups: dict[tuple[Split, int], dict[int, dict[str, ImageRef]]] = {}
    for image in report.contact_sheet:
        rows = groups.setdefault((image.split, image.label), {})
        rows.setdefault(image.row, {})[image.column] = image
    for (split, label), rows in groups.items():
        figures = "".join(
            _figure([row.get(name) for name in names], report, images) for row in rows.values()
        )
        name = escape(report.class_names[label])
        yield f"<h3 class='caption'>{_split(split)} · {name}</h3>"
        yield f"<div class='card sheet{' wide' * (len(names) > 1)}'>{figures}</div>"


def _figure(row: Sequence[ImageRef | None], report: Report, images: Images) -> str:
    """Return the images of one row side by side; None is a missing image."""
    shown = "".join(_image(image, images) for image in row)
    first = next(image for image in row if image)
    key, label = escape(first.key), escape(report.class_names[first.label])
    return (
        f"<figure><div class='strip'>{shown}</div><figcaption>"
        f"<span class='key' title='{key}'>{key}</span>"
        f"<span class='muted'><span class='{first.split}'>{first.split}</span> · {label}"
        "</span></figcaption></figure>"
    )


def _image(image: ImageRef | None, images: Images) -> str:
    content = images.get((image.split, image.row, image.column)) if image else None
    if image is None or content is None:
        return "<div class='lost'></div>"
    data = base64.b64encode(content).decode()
    alt = escape(f"{image.column} of {image.key}")
    return f"<img alt='{alt}' title='{alt}' src='data:image/jpeg;base64,{data}'>"


def _quarantine(report: Report) -> Iterator[str]:
    yield "<h2>Quarantine</h2>"
    if not report.quarantine:
        yield "<p>Empty: all rows are valid.</p>"
    for reason in report.quarantine:
        rows = [
            [NONE if row.key is None else escape(row.key), escape(row.detail)]
            for row in reason.examples
        ]
        examples = table(["key", "detail"], rows, "small bad") if rows else ""
        head = f"{escape(reason.reason)}: {count_text(reason.num_rows, 'row')}"
        yield f"<div class='card picture'><h3>{head}</h3>{examples}</div>"


def _method(report: Report) -> str:
    limit = report.thresholds
    return (
        "<h2>Method</h2><p class='muted small'>"
        "Drift: the population stability index (PSI) over the deciles of the training split, or "
        f"over categories, is at least {limit['psi']:g}, and the p-value of the difference "
        f"(Kolmogorov–Smirnov; chi-squared for categories) is below {limit['p_value']:g}. "
        f"Missing values: the fractions differ by at least {limit['missing_share']:.0%} of the "
        "rows, with the same limit on the p-value. Leakage: the AUC of the values, or of whether "
        f"a value is missing, is at least {limit['leak_auc']:g} or at most "
        f"{1 - limit['leak_auc']:g}; a category is scored by its positive fraction in the training "
        "split, and the AUC is measured on the other splits. Nearly identical images: their "
        f"perceptual hashes differ in at most {limit['near_bits']:g} of 64 bits, and their "
        f"contrast is at least {limit['flat_contrast']:g}. Images with less contrast are black "
        f"(brightness below {limit['black_brightness']:g}), white (above "
        f"{limit['white_brightness']:g}) or single-colour. Groups are not stored in prepared data, "
        "so rows of one group in several splits cannot be detected.</p>"
    )


def _split(split: str) -> str:
    return f"<span class='dot {split}'></span>{split}"


def _legend() -> str:
    return " ".join(f"<span style='margin-right:10px'>{_split(split)}</span>" for split in SPLITS)


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"


def _shaded_share(share: float) -> str:
    return f"<span class='share' style='--share:{100 * share:.1f}%'>{share:.1%}</span>"


def _p_value(p_value: float | None) -> str:
    if p_value is None:
        return NONE
    return "< 0.0001" if p_value < 1e-4 else f"{p_value:.4f}"


def _flagged(text: str, flag: bool) -> str:
    return f"<span class='flag'>{text}</span>" if flag else text
