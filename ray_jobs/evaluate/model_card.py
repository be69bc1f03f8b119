"""Writes the model card of a run: data, figures, limits and how to load it, from facts alone.

Sections as in Mitchell et al. 2019, "Model Cards for Model Reporting", where the run has the facts.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from ray_jobs.checks.finding import Finding
from ray_jobs.config.inference_spec import EvaluateSpec
from ray_jobs.config.text import count_text, names_text, number_text
from ray_jobs.evaluate.analysis import HEAD
from ray_jobs.evaluate.uncertainty.model_comparison import METRIC_NAMES
from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.train.finalize import MODEL, SUMMARY
from ray_jobs.train.job import ENVIRONMENT, SPEC

MODEL_CARD = "model_card.md"

_MAX_SLICES = 5


def model_card(
    run: TrainedRun,
    metrics: Mapping[str, Any],
    findings: Sequence[Finding],
    spec: EvaluateSpec,
) -> str:
    """Return the model card as Markdown.

    Args:
        run: The run.
        metrics: Content of metrics.json.
        findings: Findings of the evaluation.
        spec: Settings of the evaluation.
    """
    name = str(run.folder).rstrip("/").rpartition("/")[2]
    sections = {
        "Task": _task(run),
        "Training": _training(run),
        f"Figures on the {spec.split} split": _figures(metrics, spec),
        "Compared with": _comparisons(metrics),
        "Findings": [f"- `{f.code}` ({f.severity}): {f.text}." for f in findings] or ["- None."],
        "Where it is worse": _slices(metrics),
        "Limits": _limits(run),
        "Loading": [
            "```python",
            "import mm_model",
            f'model = mm_model.load_model("{run.folder}/{MODEL}")',
            "```",
        ],
    }
    parts = [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items()]
    return "\n\n".join([f"# {name}", *parts]) + "\n"


def _task(run: TrainedRun) -> Iterator[str]:
    manifest = run.manifest
    image, words = manifest.image, [vocabulary.column for vocabulary in manifest.vocabularies]
    column = manifest.prepare.label_column
    yield f"- Probability that `{column}` is {manifest.positive_label!r}, as a calibrated number."
    if run.takes_images and not image.features:
        count = count_text(len(image.columns), "image")
        yield f"- {count} per row, of {image.width} × {image.height} pixels."
    if run.takes_numbers:
        yield f"- Numbers: {names_text(manifest.numeric_columns)}. Words: {names_text(words)}."
    if run.text is not None:
        yield f"- Texts: {names_text(run.text.columns)}."
    yield f"- Decision threshold: {number_text(run.threshold)}."


def _training(run: TrainedRun) -> Iterator[str]:
    for split, info in run.manifest.splits.items():
        yield (
            f"- {split}: {count_text(info.num_rows, 'row')}, {info.class_counts[1]:,} of them "
            f"{run.manifest.positive_label!r}."
        )
    if any(run.manifest.quarantine.values()):
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in run.manifest.quarantine.items())
        yield f"- Rows and images that were left out: {reasons}."
    summary, folder = run.folder.read_json(SUMMARY), run.folder
    if "num_models" in summary:
        yield f"- Mean of {count_text(summary['num_models'], 'model')} of cross-validation."
    if folder.exists(SPEC):
        model = yaml.safe_load(folder.read_bytes(SPEC))["model"]
        used = {
            "image": run.takes_images,
            "numeric": run.takes_numbers,
            "text": run.text is not None,
            "fusion": len(run.heads) > 1,
        }
        kinds = {name: model[name]["kind"] for name, is_used in used.items() if is_used}
        yield "- Model: " + ", ".join(f"{name} `{kind}`" for name, kind in kinds.items()) + "."
    if "epochs" in summary:
        yield (
            f"- {summary['num_parameters']:,} parameters; epoch {summary['best_epoch']} of "
            f"{summary['epochs']}, trained by {count_text(summary['num_workers'], 'worker')}."
        )
    if folder.exists(ENVIRONMENT):
        environment = folder.read_json(ENVIRONMENT)
        packages = environment["packages"]
        versions = ", ".join(f"{name} {packages[name]}" for name in ("keras", "tensorflow", "ray"))
        yield f"- Started at {environment['created']} with {versions}."


def _figures(metrics: Mapping[str, Any], spec: EvaluateSpec) -> Iterator[str]:
    groups = metrics["num_groups"]
    counted = count_text(metrics["num_rows"], "row")
    counted += f" of {count_text(groups, 'group')}" if groups else ""
    yield f"{counted} of `{spec.data}`; intervals of 95 % from a bootstrap.\n"
    yield "| metric | value | interval |\n|---|---|---|"
    for name, interval in metrics["intervals"].items():
        ends = "" if interval is None else "{:.3f} to {:.3f}".format(*interval)
        yield f"| {METRIC_NAMES[name]} | {number_text(metrics[name], 3)} | {ends} |"


def _comparisons(metrics: Mapping[str, Any]) -> Iterator[str]:
    for other in metrics["comparisons"]:
        found = other["differences"]["log_loss"]
        if found["low"] is not None:
            kind = " head" if other["kind"] == HEAD else ""
            yield (
                f"- {other['name']}{kind}: {found['verdict']}, log loss "
                f"{found['difference']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})."
            )
    if reason := metrics["baselines_skipped"]:
        yield f"- No baselines: {reason}."


def _slices(metrics: Mapping[str, Any]) -> list[str]:
    worse = [part for part in (*metrics["cohorts"], *metrics["slices"]) if part["is_worse"]]
    lines = [
        f"- {' = '.join(filter(None, (part['column'], part['value'])))}: log loss "
        f"{part['log_loss']:.3f} on {count_text(part['num_rows'], 'row')}, "
        f"{part['difference']:+.3f} ({part['low']:+.3f} to {part['high']:+.3f}) from the others."
        for part in worse[:_MAX_SLICES]
    ]
    return lines or [f"- In none of {count_text(len(metrics['slices']), 'slice')}, beyond chance."]


def _limits(run: TrainedRun) -> Iterator[str]:
    manifest, statistics = run.manifest, run.manifest.statistics
    if run.takes_images and not manifest.image.optional:
        yield "- Rows without an image cannot be predicted."
    if run.takes_numbers and statistics is not None:
        for name, known in zip(manifest.numeric_columns, statistics.quantiles, strict=True):
            if known:
                ends = f"{number_text(known[0])} to {number_text(known[-1])}"
                yield f"- `{name}` was {ends} in training; other values are extrapolated."
    for vocabulary in manifest.vocabularies if run.takes_numbers else ():
        count = count_text(len(vocabulary.words), "word")
        yield f"- `{vocabulary.column}` had {count} in training; others count as unknown."
