"""Turn raw images and a table into shards with a manifest.

Reads: a table with one row per example, and images, either as single files or inside Parquet, tar
or TFRecord files.
Writes: train/, validation/ and test/ with Parquet shards, quarantine/ with the unusable rows, and
manifest.json, written last.

Run:   python -m ray_jobs.prepare ray_jobs/specs/houses.yaml --prepare.output prepared

With --prepare.dry_run true, it prints within seconds what the columns are, how the rows would be
split and the first problems, and writes nothing.

The driver reads the table, checks its rows and assigns them to splits and shards. Each Ray task
reads and converts the images of one shard and returns its statistics. A later run keeps the shards
whose rows have not changed; a run that was interrupted resumes when started again.
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS, PrepareSpec, Split
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.manifest import Manifest, SplitInfo, require_shards
from ray_jobs.prepare.dry_run import dry_run
from ray_jobs.prepare.findings import check_quarantine, quarantine_bad_images
from ray_jobs.prepare.inputs import make_writer, no_images, read_inputs
from ray_jobs.prepare.new_manifest import make_manifest, require_both_classes
from ray_jobs.prepare.prepare_summary import print_summary
from ray_jobs.prepare.shards.shard_plan import Plan, make_plan
from ray_jobs.prepare.shards.shard_tasks import clear_progress, write_shards
from ray_jobs.prepare.shards.shard_writer import ShardFacts
from ray_jobs.storage.folder import Folder


def prepare(spec: RunSpec) -> Manifest:
    """Write the prepared folder and return its manifest.

    With `prepare.dry_run`, write nothing, print what was understood and the first findings, and
    return the manifest as it would be without new shards.

    Raises:
        JobError: If the table or the images do not match the spec, a split would lack a class, or
            more than `max_bad_fraction` of the rows cannot be used. In the last case the rows are
            in quarantine/, and there is no new manifest.
    """
    inputs = read_inputs(spec)
    if spec.prepare.dry_run:
        return dry_run(inputs)
    spec, rows, earlier = inputs.spec, inputs.rows, inputs.earlier
    output = Folder(spec.prepare.output)
    check_quarantine(rows, spec.prepare, output)
    writer, notes = make_writer(inputs)
    plan = make_plan(rows, spec, inputs.classes, writer, earlier)
    require_both_classes(rows, plan)

    facts = sorted(write_shards(rows, plan.new, writer, spec.run), key=lambda f: f.index)
    quarantine_bad_images(rows, facts)
    try:
        check_quarantine(rows, spec.prepare, output)
        require_both_classes(rows, plan)
        _require_images(facts, plan, spec.prepare)
    except JobError:
        _delete_unlisted(output, earlier.manifest.splits if earlier else {})
        raise
    manifest = make_manifest(inputs, writer, plan, facts)
    require_shards(output, manifest)
    manifest.write(output)
    _delete_unlisted(output, manifest.splits)
    print_summary(f"Prepared {output}", inputs, notes, (plan, manifest))
    return manifest


def _require_images(facts: Sequence[ShardFacts], plan: Plan, options: PrepareSpec) -> None:
    """Check that some row has an image: otherwise, a setting must be wrong."""
    shards = [f.shard for f in facts if f.shard] + [s for kept in plan.kept.values() for s in kept]
    if shards and all(shard.num_without_image == shard.num_rows for shard in shards):
        raise no_images(options)


def _delete_unlisted(output: Folder, splits: Mapping[Split, SplitInfo]) -> None:
    """Delete the shards that are in no split of the manifest, and the records of finished ones."""
    listed = {shard.path for info in splits.values() for shard in info.shards}
    for split in SPLITS:
        for name in list(output.names(split)):
            if PurePosixPath(name).match("part-*.parquet") and name not in listed:
                output.delete(name)
    clear_progress(output)
