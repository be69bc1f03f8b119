"""The report → what in it deserves a look, the worst first.

One finding a kind and split, however many columns it is about: a list that is read to its end.
"""

from collections.abc import Iterator, Sequence

from ray_jobs.config.spec import SPLITS
from ray_jobs.inspect.columns import MISSING_THRESHOLD, P_VALUE_THRESHOLD, share_p_value
from ray_jobs.inspect.facts import Finding, Report

MOSTLY_MISSING = 0.5
_NAMED = 5


def find(report: Report) -> tuple[Finding, ...]:
    """Return what deserves a look: warnings, then notes."""
    found = [
        *_leaks(report), *_keys(report), *_overlaps(report), *_conflicts(report),
        *_pictures(report), *_drift(report), *_label_drift(report),
        *_empty_columns(report), *_within(report), *_quarantine(report), *_sample(report),
    ]  # fmt: skip
    return tuple(sorted(found, key=lambda finding: finding.severity != "warning"))


def _leaks(report: Report) -> Iterator[Finding]:
    for facts in report.columns:
        if facts.leak.suspect:
            named = {"its value": facts.leak.auc, "whether it is missing": facts.leak.missing_auc}
            told = {how: auc for how, auc in named.items() if auc is not None}
            how = max(told, key=lambda name: abs(told[name] - 0.5))
            yield _warning(
                "leak",
                f"{facts.column} alone predicts the label: {how} has an AUC of "
                f"{told[how]:.4f}. Is it known before the answer is? If not, exclude it.",
            )


def _keys(report: Report) -> Iterator[Finding]:
    if report.keys.num_shared:
        one = report.keys.examples[0]
        yield _warning(
            "shared_key",
            f"{_counted(report.keys.num_shared, 'key')} in more than one split, such as "
            f"{one.key!r} in {' and '.join(one.splits)}.",
        )


def _overlaps(report: Report) -> Iterator[Finding]:
    for overlap in report.duplicates.overlaps:
        between = f"{overlap.second} and in {overlap.first}"
        same = [pair for pair in overlap.examples if pair.exact]
        if same:
            pair = f"{same[0].second.key!r} and {same[0].first.key!r}"
            yield _warning(
                "same_image",
                f"{_counted(overlap.exact, 'image')} in {between}: the same bytes, such as {pair}.",
            )
        if overlap.near:
            yield _warning(
                "near_image",
                f"{_counted(overlap.near, 'image')} nearly the same in {between}; "
                "the pairs are shown below.",
            )
        if not overlap.complete:
            yield _note(
                "search_cut_short",
                f"So many images of {overlap.first} and {overlap.second} look alike that "
                "the search for near-duplicates was cut short.",
            )


def _conflicts(report: Report) -> Iterator[Finding]:
    if report.duplicates.conflicting:
        yield _warning(
            "conflicting_labels",
            f"{_counted(report.duplicates.conflicting, 'image')} in rows of both classes: "
            "the same bytes, another label.",
        )


def _pictures(report: Report) -> Iterator[Finding]:
    for image in report.images:
        for kind in ("unreadable", "black", "white", "flat"):
            counts = {str(split): getattr(facts, kind) for split, facts in image.splits.items()}
            if total := sum(counts.values()):
                what = "of one colour" if kind == "flat" else kind
                where = ", ".join(f"{split} {n:,}" for split, n in counts.items() if n)
                yield Finding(
                    kind=f"{kind}_image",
                    severity="warning" if kind == "unreadable" else "note",
                    text=f"{_counted(total, 'image')} {what} in {image.column} ({where}).",
                )


def _drift(report: Report) -> Iterator[Finding]:
    for split in SPLITS[1:]:
        values = [facts for facts in report.columns if facts.drift[split].values_drifted]
        if values:
            worst = sorted(values, key=lambda f, s=split: -(f.drift[s].psi or 0))
            named = [f"{facts.column} (PSI {facts.drift[split].psi:.2f})" for facts in worst]
            yield _warning(
                "drift",
                f"{split} differs from train in {_listed(named)}.",
            )
        if missing := [f.column for f in report.columns if f.drift[split].missing_drifted]:
            yield _warning(
                "missing_drift",
                f"{split} has another share of missing values than train in {_listed(missing)}.",
            )


def _label_drift(report: Report) -> Iterator[Finding]:
    train = report.splits["train"]
    for split in SPLITS[1:]:
        facts = report.splits[split]
        if train.positive_share is None or facts.positive_share is None:
            continue
        p_value = share_p_value([(s.class_counts[1], s.num_rows) for s in (train, facts)])
        apart = abs(train.positive_share - facts.positive_share)
        if apart >= MISSING_THRESHOLD and p_value is not None and p_value < P_VALUE_THRESHOLD:
            yield _warning(
                "label_drift",
                f"{facts.positive_share:.1%} of {split} are {report.class_names[1]!r}, "
                f"{train.positive_share:.1%} of train.",
            )


def _empty_columns(report: Report) -> Iterator[Finding]:
    columns = [*report.numeric, *report.categorical]
    shares = {f.column: f.splits["train"].missing / max(f.splits["train"].num_rows, 1)
              for f in columns}  # fmt: skip
    if mostly := [f"{c} ({share:.0%})" for c, share in shares.items() if share > MOSTLY_MISSING]:
        yield _note(
            "mostly_missing",
            f"Mostly missing in train: {_listed(mostly)}.",
        )
    constant = [
        f.column
        for f in report.numeric
        if f.splits["train"].min is not None and f.splits["train"].min == f.splits["train"].max
    ]
    if constant:
        yield _note(
            "constant",
            f"Only one value in train: {_listed(constant)}.",
        )


def _within(report: Report) -> Iterator[Finding]:
    counts = report.duplicates.within
    if total := sum(counts.values()):
        where = ", ".join(f"{split} {n:,}" for split, n in counts.items() if n)
        yield _note(
            "repeated_image",
            f"{_counted(total, 'image')} the same as another one of the split ({where}).",
        )


def _quarantine(report: Report) -> Iterator[Finding]:
    if bad := sum(facts.num_rows for facts in report.quarantine):
        rows = bad + sum(facts.num_rows for facts in report.splits.values())
        reasons = [f"{facts.reason} {facts.num_rows:,}" for facts in report.quarantine]
        yield _note(
            "quarantine",
            f"{bad:,} of {rows:,} rows ({bad / rows:.2%}) are in quarantine: {_listed(reasons)}.",
        )


def _sample(report: Report) -> Iterator[Finding]:
    some = {s: f for s, f in report.splits.items() if f.rows_inspected < f.num_rows}
    if some:
        named = [f"{f.rows_inspected:,} of {f.num_rows:,} of {s}" for s, f in some.items()]
        yield _note(
            "sample",
            f"Looked at a sample of rows: {_listed(named)}. Figures but the counts are the "
            "sample's, and pairs of duplicates outside of it are not seen; --max_rows widens it.",
        )


def _warning(kind: str, text: str) -> Finding:
    return Finding(kind=kind, severity="warning", text=text)


def _note(kind: str, text: str) -> Finding:
    return Finding(kind=kind, severity="note", text=text)


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing} is" if number == 1 else f"{number:,} {thing}s are"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
