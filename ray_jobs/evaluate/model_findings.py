"""Derives findings from an evaluation: what its readers should know before they trust the model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_jobs.checks.finding import Finding, note, warning
from ray_jobs.config.text import count_text
from ray_jobs.evaluate.analysis import BASELINE, HEAD
from ray_jobs.evaluate.uncertainty.model_comparison import METRIC_NAMES
from ray_jobs.predict.input_drift import drift_findings

_MIN_OF_CLASS = 30
_ALPHA = 0.01
_MAX_NAMES = 3
_SUSPICIOUS_AUC = 0.995
_MIN_SHARE = 0.05
_MAX_SIMILARITY = 0.5
_EXPECTED_UNFAMILIAR = 0.03
_MAX_GAP = 2.0
_NOUNS = {BASELINE: "baseline", HEAD: "head"}


def model_findings(
    metrics: Mapping[str, Any], blend: Mapping[str, float], class_names: Sequence[str]
) -> tuple[Finding, ...]:
    """Return the findings of an evaluation: warnings, then notes.

    Args:
        metrics: Result of `analyse`.
        blend: Weight of each head in the blend; empty if unknown.
        class_names: Names of the classes 0 and 1.
    """
    findings = [
        *_split(metrics),
        *_classes(metrics, class_names),
        *_leaks(metrics),
        *_comparisons(metrics),
        *_calibration(metrics),
        *drift_findings(metrics["drift"]),
        *_unfamiliar(metrics),
        *_gap(metrics["training_gap"]),
        *_slices(metrics),
        *_heads(blend),
        *_explanation(metrics["explanation"]),
    ]
    return tuple(sorted(findings, key=lambda finding: finding.severity != "warning"))


def _split(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    if not metrics["is_held_out"]:
        yield warning(
            "not_held_out",
            f"The {count_text(metrics['num_rows'], 'row')} were used to train, calibrate or select "
            "the model, so the figures are too good",
            "evaluate the test split",
        )
    groups = metrics["num_groups"]
    if groups is not None and groups < _MIN_OF_CLASS:
        yield note(
            "few_groups",
            f"The rows are of only {count_text(groups, 'group')}, so the intervals are too narrow",
        )


def _classes(metrics: Mapping[str, Any], class_names: Sequence[str]) -> Iterator[Finding]:
    counts = dict(zip(class_names, metrics["class_counts"], strict=True))
    name, fewest = min(counts.items(), key=lambda item: item[1])
    if not fewest:
        yield warning(
            "class_absent",
            f"None of the {count_text(metrics['num_rows'], 'row')} is {name!r}, so metrics that "
            "compare the classes are undefined",
            "evaluate rows of both classes",
        )
    elif fewest < _MIN_OF_CLASS:
        yield note(
            "few_rows",
            f"Only {count_text(fewest, 'row')} of {metrics['num_rows']:,} are {name!r}, so all "
            "metrics that depend on this class are uncertain",
        )


def _leaks(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    if shared := metrics["shared_groups"]:
        yield warning(
            "group_straddles_splits",
            f"{count_text(shared, 'group')} of {metrics['num_groups']:,} have rows among the "
            "training rows, so the figures are too good",
            "evaluate rows of other groups",
        )
    aucs = {
        other["name"]: other["metrics"]["roc_auc"]
        for other in metrics["comparisons"]
        if other["kind"] == BASELINE and other["metrics"]["roc_auc"] is not None
    }
    best = max(aucs, key=lambda name: aucs[name], default=None)
    if best is not None and aucs[best] > _SUSPICIOUS_AUC:
        yield warning(
            "leak_suspect",
            f"The baseline {best} reaches a ROC AUC of {aucs[best]:.4f} from numbers and words "
            "alone; a column may derive from the label",
            "look at the importance of columns, and at `inspect`",
        )


def _comparisons(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    for kind, code in ((BASELINE, "worse_than_baseline"), (HEAD, "worse_than_head")):
        others = [other for other in metrics["comparisons"] if other["kind"] == kind]
        worse = [text for other in others if (text := _worse(other))]
        if worse:
            yield warning(
                code,
                f"The model is worse than {len(worse)} of {count_text(len(others), _NOUNS[kind])}: "
                f"{'; '.join(worse)}",
            )


def _worse(other: Mapping[str, Any]) -> str:
    """Return the metrics in which the model is worse than another one."""
    found = other["differences"]
    texts = [
        f"{METRIC_NAMES[name]} {found[name]['difference']:+.3f} "
        f"({found[name]['low']:+.3f} to {found[name]['high']:+.3f})"
        for name in ("roc_auc", "log_loss")
        if found[name]["verdict"] == "worse"
    ]
    return f"{other['name']}, {', '.join(texts)}" if texts else ""


def _calibration(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    found = metrics["calibration"]
    if found is not None and found["p_value"] < _ALPHA:
        yield warning(
            "miscalibrated",
            f"The calibration error is {found['ece']:.3f}; if the probabilities were right, it "
            f"would be at most {found['high']:.3f} in 95 % of samples of "
            f"{metrics['num_rows']:,} rows",
        )


def _unfamiliar(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    from scipy.stats import binom

    count, num_rows = metrics["num_unfamiliar"], metrics["num_rows"]
    # One percent is expected; on few validation rows, the limit itself is uncertain.
    if count is not None and binom.sf(count - 1, num_rows, _EXPECTED_UNFAMILIAR) < _ALPHA:
        yield warning(
            "unfamiliar_rows",
            f"{count:,} of {count_text(num_rows, 'row')} are farther from the training rows than "
            "99 % of the validation rows",
            "look at them in report.html, and train on rows like them",
        )


def _gap(gap: Mapping[str, float] | None) -> Iterator[Finding]:
    if gap and gap["low"] > 0 and gap["validation"] > _MAX_GAP * gap["training"]:
        yield note(
            "overfitted",
            f"The log loss is {gap['training']:.3f} on training rows, but {gap['validation']:.3f} "
            f"on validation rows (difference {gap['low']:+.3f} to {gap['high']:+.3f})",
        )


def _slices(metrics: Mapping[str, Any]) -> Iterator[Finding]:
    slices = metrics["slices"]
    worse = [part for part in slices if part["is_worse"]]
    if worse:
        named = ", ".join(f"{part['column']} = {part['value']}" for part in worse[:_MAX_NAMES])
        yield note(
            "weak_slice",
            f"The log loss is higher than elsewhere in {len(worse)} of "
            f"{count_text(len(slices), 'slice')}, most in {named}",
        )


def _explanation(explanation: Mapping[str, Any]) -> Iterator[Finding]:
    first, *others = explanation["importance"] or [{}]
    if (
        others
        and not first["is_image"]
        and first["low"] > 0
        and _MIN_SHARE * first["log_loss"] > sum(max(other["log_loss"], 0) for other in others)
    ):
        yield warning(
            "one_column_decides",
            f"Permuting {', '.join(first['columns'])} increases the log loss by "
            f"{first['log_loss']:.3f}; permuting the {count_text(len(others), 'other input')} "
            "hardly matters",
        )
    similarity = explanation["map_similarity"]
    if similarity is not None and similarity > _MAX_SIMILARITY:
        yield warning(
            "maps_ignore_training",
            f"The maps of the images hardly change if the weights are shuffled (rank correlation "
            f"{similarity:.2f}), so they do not show what the model has learned",
        )


def _heads(blend: Mapping[str, float]) -> Iterator[Finding]:
    silent = [head for head, weight in blend.items() if weight == 0]
    if silent:
        yield note(
            "head_without_vote",
            f"{len(silent)} of {len(blend)} heads ({', '.join(silent)}) have no weight in the "
            "probability, because they added nothing to the others on the validation rows",
        )
