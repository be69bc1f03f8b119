"""Reports what `prepare` would do, from the table and a sample of the images; writes nothing."""

from dataclasses import dataclass

import numpy as np

from ray_jobs.checks.finding import Finding, from_message, ok, print_findings, require_no_error
from ray_jobs.config.errors import JobError
from ray_jobs.data.manifest import Manifest
from ray_jobs.prepare.findings import (
    bad_rows,
    count_reasons,
    describe_row,
    row_findings,
    sample_images,
)
from ray_jobs.prepare.inputs import Inputs, make_writer
from ray_jobs.prepare.new_manifest import make_manifest, require_both_classes
from ray_jobs.prepare.prepare_summary import print_summary
from ray_jobs.prepare.shards.shard_plan import Plan, make_plan

_MAX_FINDINGS = 10


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run."""

    findings: list[Finding]
    notes: tuple[str, ...]
    planned: tuple[Plan, Manifest] | JobError
    """The plan and the manifest without new shards, or why there is none; a finding says the
    same."""


def dry_run(inputs: Inputs) -> Manifest:
    """Print the result of a dry run, and return its manifest.

    Raises:
        JobError: If a finding is an error.
    """
    result = examine_inputs(inputs)
    planned = None if isinstance(result.planned, JobError) else result.planned
    print_summary("Dry run, nothing was written", inputs, result.notes, planned)
    print_findings(result.findings[:_MAX_FINDINGS] or [ok("findings", "none")])
    require_no_error(result.findings)
    if isinstance(result.planned, JobError):
        raise result.planned
    return result.planned[1]


def examine_inputs(inputs: Inputs) -> DryRun:
    """Read a sample of the images, plan the splits, and return all findings; write nothing."""
    rows = inputs.rows
    bad, num_rows = bad_rows(rows)
    is_error = len(bad) > inputs.spec.prepare.max_bad_fraction * num_rows
    examples = {rows.quarantined[row][0]: describe_row(rows, row) for row in reversed(bad)}
    findings = list(row_findings(count_reasons(rows), num_rows, examples, is_error=is_error))
    code, notes = "images", inputs.notes
    if is_error and len(bad) == num_rows:
        return DryRun(findings, notes, JobError(findings[0].sentence))
    try:
        writer, notes = make_writer(inputs)
        found, num_without = sample_images(rows, writer)
        findings += found
        code = "splits"
        plan = make_plan(rows, inputs.spec, inputs.classes, writer, inputs.earlier)
        require_both_classes(rows, plan)
    except JobError as failure:
        return DryRun([*findings, from_message(code, str(failure))], notes, failure)
    if inputs.spec.prepare.missing_image == "keep":
        if not any(refs.in_containers for refs in rows.images):
            has_image = np.any([refs.has_image for refs in rows.images], axis=0)
            num_without = f"{(rows.good & ~has_image).sum():,}"
        notes = (*notes, f"rows without an image, kept: {num_without}")
    return DryRun(findings, notes, (plan, make_manifest(inputs, writer, plan, [])))
