"""Derives findings from the report, the most severe first.

Most kinds of problems give at most one finding per split, however many columns they affect, to keep
the list short. Leaks and unusable images are reported per column.
"""

from collections.abc import Iterable, Iterator

from ray_jobs.checks.column_drift import compare_fractions
from ray_jobs.checks.finding import Finding, note, warning
from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.config.text import count_text
from ray_jobs.data.manifest import Manifest
from ray_jobs.inspect.report_schema import Report
from ray_jobs.prepare.findings import stored_findings

_MOSTLY_MISSING = 0.5
_MAX_NAMES = 5


def find_problems(report: Report, manifest: Manifest) -> tuple[Finding, ...]:
    """Return the findings of a report and those of `prepare`: warnings, then notes."""
    findings = [
        *_leaks(report),
        *_shared_rows(report),
        *_images(report),
        *_drift(report),
        *_label_drift(report),
        *_uninformative_columns(report),
        *_rows(report),
        # Without a final point, which would become part of a copied flag.
        *(note(finding.code, finding.advice) for finding in stored_findings(manifest)),
    ]
    return tuple(sorted(findings, key=lambda finding: finding.severity != "warning"))


def _leaks(report: Report) -> Iterator[Finding]:
    for column in report.columns:
        if column.leak.suspect:
            aucs = {"its values": column.leak.auc, "its missing values": column.leak.missing_auc}
            defined = {source: auc for source, auc in aucs.items() if auc is not None}
            source = max(defined, key=lambda name: abs(defined[name] - 0.5))
            yield warning(
                "leak",
                f"{column.column} alone predicts the label: {source} reach an AUC of "
                f"{defined[source]:.4f}. Exclude the column unless it is known at prediction time.",
            )


def _shared_rows(report: Report) -> Iterator[Finding]:
    """Yield findings on keys and images that occur in several splits or in both classes."""
    if report.keys.num_shared:
        example = report.keys.examples[0]
        yield warning(
            "shared_key",
            f"{count_text(report.keys.num_shared, 'key')} in more than one split, such as "
            f"{example.key!r} in {' and '.join(example.splits)}.",
        )
    for overlap in report.duplicates.overlaps:
        first, second = overlap.first, overlap.second
        if overlap.exact:
            pair = overlap.examples[0]
            yield warning(
                "same_image",
                f"{count_text(overlap.exact, 'image')} in {second} with the same bytes as an image "
                f"in {first}, such as {pair.second.key!r} and {pair.first.key!r}.",
            )
        if overlap.near:
            yield warning(
                "near_image",
                f"{count_text(overlap.near, 'image')} in {second} nearly identical to an image in "
                f"{first}; inspect.html shows the pairs. Different photos that look "
                "alike count as well.",
            )
        if not overlap.complete:
            yield note(
                "search_cut_short",
                f"The search for near-duplicates in {first} and {second} stopped early, because "
                "too many images look alike.",
            )
    if report.duplicates.conflicting:
        yield warning(
            "conflicting_labels",
            f"{count_text(report.duplicates.conflicting, 'image')} with the same bytes in rows of "
            "both classes.",
        )


def _images(report: Report) -> Iterator[Finding]:
    adjectives = {
        "unreadable": "unreadable", "black": "black", "white": "white", "flat": "single-colour",
    }  # fmt: skip
    for image in report.images:
        for kind, adjective in adjectives.items():
            counts = {str(split): getattr(s, kind) for split, s in image.splits.items()}
            if total := sum(counts.values()):
                yield Finding(
                    code=f"{kind}_image",
                    severity="warning" if kind == "unreadable" else "note",
                    text=f"{count_text(total, f'{adjective} image')} in column {image.column} "
                    f"({_nonzero(counts.items())}).",
                )


def _drift(report: Report) -> Iterator[Finding]:
    for split in SPLITS[1:]:
        drifts = {column.column: column.drift[split] for column in report.columns}
        psi = {name: drift.psi or 0.0 for name, drift in drifts.items() if drift.values_drifted}
        if psi:
            worst = sorted(psi, key=lambda name, psi=psi: -psi[name])
            named = _join(f"{name} (PSI {psi[name]:.2f})" for name in worst)
            yield warning("drift", f"Distribution in {split} differs from train: {named}.")
        if missing := [name for name, drift in drifts.items() if drift.missing_drifted]:
            yield warning(
                "missing_drift",
                f"Fraction of missing values in {split} differs from train: {_join(missing)}.",
            )


def _label_drift(report: Report) -> Iterator[Finding]:
    train = report.splits["train"]
    for split in SPLITS[1:]:
        summary = report.splits[split]
        _, differ = compare_fractions([(s.class_counts[1], s.num_rows) for s in (train, summary)])
        if differ:
            yield warning(
                "label_drift",
                f"{summary.positive_share:.1%} of the rows in {split} are "
                f"{report.class_names[1]!r}, compared with {train.positive_share:.1%} in train.",
            )


def _uninformative_columns(report: Report) -> Iterator[Finding]:
    train = {c.column: c.splits["train"] for c in (*report.numeric, *report.categorical)}
    shares = {name: summary.missing / max(summary.num_rows, 1) for name, summary in train.items()}
    mostly = [f"{name} ({share:.0%})" for name, share in shares.items() if share > _MOSTLY_MISSING]
    if mostly:
        yield note("mostly_missing", f"Mostly missing in train: {_join(mostly)}.")
    numeric = {column.column: column.splits["train"] for column in report.numeric}
    constant = [name for name, s in numeric.items() if s.min is not None and s.min == s.max]
    if constant:
        yield note("constant", f"Constant in train: {_join(constant)}.")


def _rows(report: Report) -> Iterator[Finding]:
    repeated = report.duplicates.within
    if total := sum(repeated.values()):
        yield note(
            "repeated_image",
            f"{count_text(total, 'image')} with the same bytes as another image of the same split "
            f"({_nonzero(repeated.items())}).",
        )
    sampled = [
        f"{summary.rows_inspected:,} of {summary.num_rows:,} rows in {split}"
        for split, summary in report.splits.items()
        if summary.rows_inspected < summary.num_rows
    ]
    if sampled:
        yield note(
            "sample",
            f"Inspected a sample: {_join(sampled)}. All figures except row counts describe the "
            "sample, and duplicates outside it are not found. Raise --max_rows to inspect more.",
        )


def _nonzero(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{split} {number:,}" for split, number in counts if number)


def _join(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")
