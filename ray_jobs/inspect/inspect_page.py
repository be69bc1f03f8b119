"""The report and some images → inspect.html: one file that needs no network.

Light or dark as the reader's device is, one column on a phone. Everything that comes from the data
is escaped, and the page may load nothing and run nothing. Its looks are in page.css.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources

from ray_jobs.config.spec import SPLITS, Split
from ray_jobs.inspect.facts import (
    CategoryFacts,
    DriftFacts,
    ImageFacts,
    ImagePair,
    ImageRef,
    LeakFacts,
    NumericFacts,
    Report,
)
from ray_jobs.pages.page_kit import NONE, number_text

Images = Mapping[tuple[Split, int, str], bytes]

_PAIRS_SHOWN = 12


def html(report: Report, images: Images) -> str:
    """Return the page.

    Args:
        report: to show.
        images: small JPEGs by split, row and column; one that is not there is shown as lost.
    """
    sections = [
        *_header(report),
        *_rows(report),
        *_columns(report),
        *_drift(report),
        *_leaks(report),
        *_pictures(report, images),
        *_overlaps(report, images),
        *_sheet(report, images),
        *_quarantine(report),
        *_method(report),
    ]
    css = resources.files("ray_jobs.pages").joinpath("page.css").read_text("utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Inspection of {escape(report.prepared)}</title><style>\n{css}</style></head>\n"
        "<body><main>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def shown_images(report: Report) -> list[ImageRef]:
    """Return the images that the page shows."""
    pairs = [pair for overlap in report.duplicates.overlaps for pair in _shown(overlap.examples)]
    return [
        *report.contact_sheet,
        *(image for facts in report.images for image in facts.examples),
        *(image for pair in pairs for image in (pair.first, pair.second)),
    ]


def _header(report: Report) -> Iterator[str]:
    store = report.store
    rows = sum(facts.num_rows for facts in report.splits.values())
    size = sum(facts.num_bytes for facts in report.splits.values())
    shards = sum(facts.num_shards for facts in report.splits.values())
    images = "One image a row"
    if len(store.columns) > 1:
        names = ", ".join(name.partition("_")[2] for name in store.columns)
        images = f"{len(store.columns)} images a row ({escape(names)})"
    name = report.prepared.rstrip("/").rpartition("/")[2]
    yield f"<h1>{escape(name)}</h1><p class='muted'>{escape(report.prepared)}</p>"
    yield (
        f"<p>{rows:,} rows in {shards:,} shard{'s' * (shards != 1)}, {_bytes(size)}. {images}, "
        f"{store.width} × {store.height} pixels, stored as {store.encoding}. "
        f"Columns: {len(report.numeric)} of numbers, {len(report.categorical)} of words.</p>"
    )
    if not report.findings:
        yield "<p class='card good'>Nothing suspicious found.</p>"
        return
    items = (f"<li class='{f.severity}'>{escape(f.text)}</li>" for f in report.findings)
    yield f"<ul class='findings'>{''.join(items)}</ul>"


def _rows(report: Report) -> Iterator[str]:
    negative, positive = map(escape, report.class_names)
    body = []
    for split, facts in report.splits.items():
        share = facts.positive_share
        bar = f"<div class='stack'><i style='width:{100 * (share or 0):.1f}%'></i></div>"
        cells = [
            f"{facts.num_rows:,}", f"{facts.share:.1%}",
            *(f"{n:,}" for n in facts.class_counts), _percent(share), bar,
            f"{facts.num_shards:,}", _bytes(facts.num_bytes),
        ]  # fmt: skip
        body.append([_split(split), *cells])
    head = ["", "rows", "share", negative, positive, f"are {positive}", "", "shards", "size"]
    yield f"<h2>Rows</h2><div class='card'>{_table(head, body)}</div>"


def _columns(report: Report) -> Iterator[str]:
    if report.numeric:
        yield (
            f"<h2>Numbers</h2><p class='muted small'>{_legend()} Shares of each split in the same "
            "bins; values beyond the ends are in the outermost ones.</p>"
        )
        yield f"<div class='grid'>{''.join(map(_number_card, report.numeric))}</div>"
    if report.categorical:
        yield "<h2>Words</h2><p class='muted small'>The most frequent in training.</p>"
        yield f"<div class='grid'>{''.join(map(_word_card, report.categorical))}</div>"


def _number_card(facts: NumericFacts) -> str:
    rows = []
    for split, numbers in facts.splits.items():
        missing = numbers.missing / numbers.num_rows if numbers.num_rows else None
        values = (numbers.mean, numbers.std, numbers.min, numbers.median, numbers.max)
        rows.append([_split(split), _percent(missing), *map(number_text, values)])
    head = ["", "missing", "mean", "std", "min", "median", "max"]
    return (
        f"<div class='card'><h3>{escape(facts.column)}{_flags(facts)}</h3>{_histogram(facts)}"
        f"{_table(head, rows, 'small')}</div>"
    )


def _word_card(facts: CategoryFacts) -> str:
    totals = {split: max(words.num_rows, 1) for split, words in facts.splits.items()}
    rows = []
    for word in facts.splits["train"].top:
        shares = [facts.splits[s].top[word] / totals[s] for s in SPLITS]
        rows.append([escape(word) or "(empty)", *map(_share_bar, shares)])
    for kind in ("unknown", "missing"):
        shares = [getattr(facts.splits[s], kind) / totals[s] for s in SPLITS]
        rows.append([f"<span class='muted'>{kind}</span>", *map(_share_bar, shares)])
    more = facts.num_words - len(facts.splits["train"].top)
    note = f"<p class='muted small'>and {more:,} more words</p>" if more > 0 else ""
    return (
        f"<div class='card'><h3>{escape(facts.column)}{_flags(facts)}</h3>"
        f"{_table(['', *map(_split, SPLITS)], rows, 'small words')}{note}</div>"
    )


def _flags(facts: NumericFacts | CategoryFacts) -> str:
    flags = ["alone predicts the label"] if facts.leak.suspect else []
    flags += [f"{s} drifts" for s, d in facts.drift.items() if d.values_drifted]
    flags += [f"other missing share in {s}" for s, d in facts.drift.items() if d.missing_drifted]
    return "".join(f" <span class='flag small'>· {flag}</span>" for flag in flags)


def _histogram(facts: NumericFacts) -> str:
    """Return the distributions of all splits over the same bins: training filled, others lines."""
    num_bins = len(facts.edges) - 1
    if num_bins < 1:
        return "<p class='muted small'>No value in training.</p>"
    shares = {
        split: [count / max(sum(numbers.histogram), 1) for count in numbers.histogram]
        for split, numbers in facts.splits.items()
    }
    top = max(max(heights) for heights in shares.values()) or 1
    paths = [f"<path class='{split}' d='{_steps(shares[split], top)}'/>" for split in SPLITS]
    first, last = facts.edges[0], facts.edges[-1]
    if all(edge % 1 == 0.5 for edge in facts.edges):
        first, last = first + 0.5, last - 0.5
    return (
        f"<svg viewBox='0 0 {num_bins} 100' preserveAspectRatio='none' role='img' "
        f"aria-label='Distribution of {escape(facts.column)}'>{''.join(paths)}</svg>"
        f"<div class='axis'><span>{number_text(first)}</span><span>{number_text(last)}</span></div>"
    )


def _steps(shares: Sequence[float], top: float) -> str:
    heights = [f"{100 - 96 * share / top:.1f}" for share in shares]
    return "M0 100" + "".join(f"V{height}H{i}" for i, height in enumerate(heights, 1)) + "V100"


def _drift(report: Report) -> Iterator[str]:
    yield "<h2>Drift from training</h2>"
    rows = []
    for facts in report.columns:
        rows.append([f"<b>{escape(facts.column)}</b>", "", "", "", ""])
        rows += [[_split(s), *_drift_cells(facts.drift[s])] for s in SPLITS[1:]]
    head = ["", "PSI", "KS", "p", "p of missing"]
    yield f"<div class='card'>{_table(head, rows, 'small drift')}</div>"


def _drift_cells(drift: DriftFacts) -> list[str]:
    return [
        _flagged(number_text(drift.psi, 3), drift.values_drifted),
        number_text(drift.ks, 3),
        _chance(drift.p_value),
        _flagged(_chance(drift.missing_p_value), drift.missing_drifted),
    ]


def _leaks(report: Report) -> Iterator[str]:
    columns = sorted(report.columns, key=lambda facts: -_strength(facts.leak))
    rows = [
        [
            escape(f.column),
            _flagged(number_text(f.leak.auc, 4), f.leak.suspect),
            number_text(f.leak.missing_auc, 4),
        ]
        for f in columns
    ]
    yield "<h2>What one column tells of the label</h2>"
    yield "<p class='muted small'>ROC AUC of one column alone: 0.5 is chance, 0 and 1 tell all.</p>"
    yield f"<div class='card'>{_table(['', 'AUC', 'AUC of missing'], rows)}</div>"


def _strength(leak: LeakFacts) -> float:
    return max(abs(auc - 0.5) for auc in (leak.auc or 0.5, leak.missing_auc or 0.5))


def _pictures(report: Report, images: Images) -> Iterator[str]:
    yield f"<h2>Images</h2><p class='muted small'>{_legend()} Grey of 0 to 255.</p>"
    for facts in report.images:
        yield _picture_table(facts)
        cards = "".join(map(_number_card, (facts.brightness, facts.contrast)))
        yield f"<div class='grid'>{cards}</div>"
        if facts.examples:
            figures = "".join(_figure([image], report, images) for image in facts.examples)
            yield "<h3 style='margin-top:14px'>Black, white or of one colour</h3>"
            yield f"<div class='card sheet'>{figures}</div>"


def _picture_table(facts: ImageFacts) -> str:
    kinds = ("missing", "unreadable", "black", "white", "flat")
    rows = [
        [_split(s), f"{p.num_rows:,}", *(f"{getattr(p, kind):,}" for kind in kinds)]
        for s, p in facts.splits.items()
    ]
    head = ["", "rows", "missing", "unreadable", "black", "white", "one colour"]
    name = escape(facts.column)
    return f"<div class='card picture'><h3>{name}</h3>{_table(head, rows, 'small')}</div>"


def _overlaps(report: Report, images: Images) -> Iterator[str]:
    duplicates = report.duplicates
    within = ", ".join(f"{split} {n:,}" for split, n in duplicates.within.items())
    yield "<h2>Images that are there twice</h2>"
    yield f"<p>The same bytes as another image of the split: {within}.</p>"
    rows = [
        [f"{o.second} in {o.first}", f"{o.exact:,}", f"{o.near:,}{'' if o.complete else '+'}"]
        for o in duplicates.overlaps
    ]
    yield f"<div class='card'>{_table(['', 'the same bytes', 'nearly the same'], rows)}</div>"
    for overlap in duplicates.overlaps:
        if overlap.examples:
            pairs = "".join(_pair(pair, report, images) for pair in _shown(overlap.examples))
            yield f"<h3 style='margin:16px 0 8px'>{overlap.second} and {overlap.first}</h3>"
            yield f"<div class='pairs'>{pairs}</div>"


def _shown(pairs: Iterable[ImagePair]) -> list[ImagePair]:
    """Return the pairs to show: a few that are the same, and those that need eyes."""
    pairs = list(pairs)
    same = [pair for pair in pairs if pair.exact][: _PAIRS_SHOWN // 3]
    return same + [pair for pair in pairs if not pair.exact][: _PAIRS_SHOWN - len(same)]


def _pair(pair: ImagePair, report: Report, images: Images) -> str:
    what = "the same bytes" if pair.exact else f"{pair.distance} of 64 bits differ"
    if pair.first.label != pair.second.label:
        what += " <span class='flag'>· labels differ</span>"
    figures = "".join(_figure([image], report, images) for image in (pair.first, pair.second))
    return f"<div class='card pair'>{figures}<p class='small muted'>{what}</p></div>"


def _sheet(report: Report, images: Images) -> Iterator[str]:
    yield "<h2>Contact sheet</h2><p class='muted small'>Rows chosen by hash of their keys.</p>"
    for split in SPLITS:
        for label in (0, 1):
            rows: dict[int, dict[str, ImageRef]] = {}
            for image in report.contact_sheet:
                if (image.split, image.label) == (split, label):
                    rows.setdefault(image.row, {})[image.column] = image
            if rows:
                names = report.store.columns
                figures = "".join(
                    _figure([row.get(name) for name in names], report, images)
                    for row in rows.values()
                )
                name = escape(report.class_names[label])
                yield f"<h3 style='margin:14px 0 6px'>{_split(split)} · {name}</h3>"
                wide = " wide" if len(names) > 1 else ""
                yield f"<div class='card sheet{wide}'>{figures}</div>"


def _figure(row: Sequence[ImageRef | None], report: Report, images: Images) -> str:
    """Return images of one row side by side; None stands for a missing one."""
    shown = "".join(_image(image, images) for image in row)
    first = next(image for image in row if image)
    name = report.class_names[first.label]
    return (
        f"<figure><div class='strip'>{shown}</div><figcaption>"
        f"<span class='key' title='{escape(first.key)}'>{escape(first.key)}</span>"
        f"<span class='muted'><span class='{first.split}'>{first.split}</span> · {escape(name)}"
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
        yield "<p>Empty: every row could be used.</p>"
    for facts in report.quarantine:
        head = f"{escape(facts.reason)}: {facts.num_rows:,} row{'s' * (facts.num_rows != 1)}"
        rows = [
            [NONE if bad.key is None else escape(bad.key), escape(bad.detail)]
            for bad in facts.examples
        ]
        table = _table(["key", "detail"], rows, "small bad") if rows else ""
        yield f"<div class='card' style='margin-bottom:12px'><h3>{head}</h3>{table}</div>"


def _method(report: Report) -> Iterator[str]:
    limit = report.thresholds
    yield (
        "<h2>How this is judged</h2><p class='muted small'>"
        f"Drift: a population stability index (PSI) over the training deciles, or over words, of "
        f"at least {limit['psi']:g}, and a chance below {limit['p_value']:g} that two samples "
        "differ so much (Kolmogorov–Smirnov; chi-squared for words). Missing: a difference of at "
        f"least {limit['missing_share']:.0%} of the rows, and the same chance. Leakage: an AUC of "
        f"at least {limit['leak_auc']:g}, or as near to 0, of the value or of whether it is "
        "missing; of words the share of positives in training is measured on the other splits. "
        f"Nearly the same images: perceptual hashes that differ in at most {limit['near_bits']:g} "
        f"of 64 bits, of images with a contrast of at least {limit['flat_contrast']:g}; with less "
        f"they are black (below {limit['black_brightness']:g}), white (above "
        f"{limit['white_brightness']:g}) or of one colour. Rows of one group in two splits are "
        "not visible in prepared data.</p>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    names = "".join(f"<th>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{names}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _split(split: str) -> str:
    return f"<span class='dot {split}'></span>{split}"


def _legend() -> str:
    return " ".join(f"<span style='margin-right:10px'>{_split(split)}</span>" for split in SPLITS)


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"


def _share_bar(share: float) -> str:
    return (
        "<span style='display:inline-block;min-width:64px;padding:0 4px;border-radius:3px;"
        f"background:linear-gradient(90deg,var(--bar) {100 * share:.1f}%,transparent 0)'>"
        f"{share:.1%}</span>"
    )


def _chance(p_value: float | None) -> str:
    if p_value is None:
        return NONE
    return "< 0.0001" if p_value < 1e-4 else f"{p_value:.4f}"


def _flagged(text: str, flag: bool) -> str:
    return f"<span class='flag'>{text}</span>" if flag else text


def _bytes(number: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} bytes"
