"""Turn raw images and a table into shards with a manifest.

Reads: images, as files or in containers, and a table with one row a thing.
Writes: train/, validation/ and test/ with Parquet shards, quarantine/ with the rows that cannot be
used, and manifest.json, written last.
Run:   python -m ray_jobs.prepare ray_jobs/specs/houses.yaml --prepare.output prepared

The driver reads the table, decides which rows are good and where each goes; Ray tasks read and
convert the images, one shard each, and answer with a few facts. Prepared again, shards whose rows
are as they were stay; killed and started again, it goes on where it stopped.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mm_model.statistics import (
    NumericStatistics,
    Vocabulary,
    fit_numeric_statistics,
    fit_vocabulary,
)
from ray_jobs.cluster import connection
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import SPLITS, RunSpec, Split
from ray_jobs.data.manifest import Manifest, Shard, SplitInfo, require_shards
from ray_jobs.prepare import journal
from ray_jobs.prepare.labels import find_classes
from ray_jobs.prepare.row_validation import Rows, read_rows
from ray_jobs.prepare.shard_plan import NewShard, Plan, make_plan, read_earlier, select
from ray_jobs.prepare.shard_writer import ShardFacts, ShardWriter
from ray_jobs.prepare.sources import open_source
from ray_jobs.prepare.table import find_numeric_columns
from ray_jobs.storage.folder import Folder

QUARANTINE = "quarantine/part-00000.parquet"

_TEXTS_AT_ONCE = 1 << 16
_TASKS_PER_CPU = 2
_CANCEL_TIMEOUT_S = 30.0


def prepare(spec: RunSpec) -> Manifest:
    """Write the prepared folder and return its manifest.

    Raises:
        JobError: if table or images are not what the spec says, more than `max_bad_fraction` of
            the rows cannot be used (they are in quarantine/ then, and there is no new manifest),
            or a split would lack a class.
    """
    output, categorical = Folder(spec.prepare.output), spec.data.categorical
    earlier = read_earlier(output)
    source = open_source(spec.prepare, categorical)
    if source.split_column:
        spec = spec.overlay({"prepare.split_column": source.split_column})
    options = spec.prepare
    numeric_columns = find_numeric_columns(source.table, options, categorical)
    classes = find_classes(source.table.column(options.label_column), options)
    rows = read_rows(source, options, numeric_columns, classes, categorical)
    aside = _Quarantine(spec, rows, source.unmatched, output)
    aside.require_few()
    writer = ShardWriter(
        readers=tuple(source.readers[name] for name in options.image_columns or ("",)),
        output=output,
        numeric_columns=numeric_columns,
        categorical=categorical,
        spec=options,
        seed=spec.run.seed,
    )
    # The table's own cells are not needed any more, and may be many.
    del source
    plan = make_plan(rows, spec, classes, writer, earlier)
    _require_both_classes(rows, plan)

    facts = sorted(_written(rows, plan, writer, spec), key=lambda f: f.index)
    _set_aside(rows, facts)
    try:
        aside.require_few()
        _require_both_classes(rows, plan)
    except JobError:
        before = earlier.manifest.splits.values() if earlier else ()
        _tidy(output, keep=(shard for info in before for shard in info.shards))
        raise
    result = Manifest(
        prepare=options,
        seed=spec.run.seed,
        image=writer.image,
        numeric_columns=numeric_columns,
        vocabularies=_vocabularies(rows, plan),
        negative_label=classes.negative,
        positive_label=classes.positive,
        splits={split: _split_info(rows, plan, facts, split) for split in SPLITS},
        cuts=plan.cuts,
        statistics=_statistics(rows, plan, numeric_columns),
        quarantine=aside.reasons(),
    )
    require_shards(output, result)
    result.write(output)
    _tidy(output, keep=(shard for info in result.splits.values() for shard in info.shards))
    _print_summary(result, plan, output)
    return result


def _written(rows: Rows, plan: Plan, writer: ShardWriter, spec: RunSpec) -> Iterator[ShardFacts]:
    """Yield the facts of each new shard when it is there, in whatever order."""
    from rich.progress import track

    finished = journal.read_finished(writer.output) if plan.new else {}
    todo = []
    for new in plan.new:
        # Where nothing is finished, there is nothing to compute names for.
        name = journal.name_of(writer, select(rows, *new)) if finished else ""
        if name in finished:
            yield finished[name]
        else:
            todo.append(new)
    if todo:
        with connection.connected(spec.run.address, num_cpus=1, worker_logs=spec.run.worker_logs):
            yield from track(
                _write_shards(rows, todo, writer),
                description="Writing shards",
                total=len(todo),
                disable=not sys.stdout.isatty(),
                transient=True,
            )


def _write_shards(
    rows: Rows, todo: Sequence[NewShard], writer: ShardWriter
) -> Iterator[ShardFacts]:
    """Yield the facts of shards as tasks write them: a few at a time, each handed its own rows."""
    import ray
    from ray.exceptions import RayError

    task, shared = ray.remote(num_cpus=1)(journal.write_noted), ray.put(writer)
    pending: list[ray.ObjectRef] = []

    def next_facts() -> ShardFacts:
        ready, pending[:] = ray.wait(pending)
        facts = ray.get(ready[0])
        if isinstance(facts, str):
            raise JobError(f"{writer.output} could not be written: {facts}")
        return facts

    try:
        for new in todo:
            # Asked each time, since a cluster may grow.
            if len(pending) >= _TASKS_PER_CPU * max(ray.cluster_resources().get("CPU", 1), 1):
                yield next_facts()
            pending.append(task.remote(shared, select(rows, *new)))
        while pending:
            yield next_facts()
    except RayError as error:
        raise JobError(
            f"a process of the job failed ({type(error).__name__}); --run.worker_logs true shows "
            "its log"
        ) from error
    finally:
        for ref in pending:
            ray.cancel(ref)
        if pending:
            # Else they would still write while the folder is tidied.
            ray.wait(pending, num_returns=len(pending), timeout=_CANCEL_TIMEOUT_S)


def _set_aside(rows: Rows, facts: Sequence[ShardFacts]) -> None:
    """Note the rows whose images turned out bad."""
    bad = [bad for shard in facts for bad in shard.bad_rows]
    keys = pa.array([row.key for row in bad], pa.string())
    for row, found in zip(pc.index_in(keys, value_set=rows.keys).to_pylist(), bad, strict=True):
        rows.quarantine(row, found.reason, found.detail)


class _Quarantine:
    """What is set aside: rows that cannot be used, and images that no row names."""

    def __init__(
        self, spec: RunSpec, rows: Rows, unmatched: Sequence[tuple[str, str, str]], output: Folder
    ) -> None:
        self.rows, self.unmatched, self.output = rows, unmatched, output
        self.max_bad_fraction = spec.prepare.max_bad_fraction
        self.skipped = ("missing_label",) if spec.prepare.skip_unlabelled else ()

    def reasons(self) -> dict[str, int]:
        """Return how many there are, by reason."""
        counts = Counter(reason for reason, _ in self.rows.bad.values())
        counts.update(reason for _, reason, _ in self.unmatched)
        return dict(sorted(counts.items()))

    def require_few(self) -> None:
        """Write them into quarantine, and check that bad rows are few.

        Raises:
            JobError: if they are not.
        """
        self._write()
        bad = [row for row, (reason, _) in self.rows.bad.items() if reason not in self.skipped]
        num_rows = len(self.rows) - len(self.rows.bad) + len(bad)
        if len(bad) <= self.max_bad_fraction * num_rows:
            return
        first = min(bad)
        key, detail = self.rows.keys[first].as_py(), self.rows.bad[first][1]
        counts = Counter(self.rows.bad[row][0] for row in bad)
        counted = ", ".join(f"{reason} {n}" for reason, n in sorted(counts.items()))
        raise JobError(
            f"{len(bad)} of {num_rows} rows ({len(bad) / num_rows:.1%}) cannot be used, more than "
            f"prepare.max_bad_fraction={self.max_bad_fraction:g} allows: {counted}. The first: "
            f"{detail if key is None else f'{key!r}, {detail}'}. All of them are in "
            f"{self.output}/{QUARANTINE}; mend them, or raise prepare.max_bad_fraction"
        )

    def _write(self) -> None:
        bad = sorted(self.rows.bad)
        found = [self.rows.bad[row] for row in bad]
        keys = self.rows.keys.take(pa.array(bad, pa.int64())).to_pylist()
        columns = {
            "key": [*keys, *(key for key, _, _ in self.unmatched)],
            "reason": [*(reason for reason, _ in found), *(r for _, r, _ in self.unmatched)],
            "detail": [*(detail for _, detail in found), *(d for _, _, d in self.unmatched)],
        }
        schema = pa.schema([(name, pa.string()) for name in columns])
        stream = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=schema), stream)
        self.output.write_bytes(QUARANTINE, stream.getvalue().to_pybytes())


def _good(rows: Rows, plan: Plan, split: Split) -> np.ndarray:
    return plan.members[split][rows.good[plan.members[split]]]


def _class_counts(rows: Rows, plan: Plan, split: Split) -> tuple[int, int]:
    counts = np.bincount(rows.labels[_good(rows, plan, split)], minlength=2).tolist()
    return counts[0], counts[1]


def _require_both_classes(rows: Rows, plan: Plan) -> None:
    for split in SPLITS:
        counts = _class_counts(rows, plan, split)
        if not all(counts):
            raise JobError(
                f"the {split} split would hold {counts[0]} rows of class 0 and {counts[1]} of "
                f"class 1 (splits {plan.note}); it needs both: add rows, change "
                "prepare.validation_fraction or test_fraction, or take another run.seed"
            )


def _split_info(rows: Rows, plan: Plan, facts: Sequence[ShardFacts], split: Split) -> SplitInfo:
    counts = _class_counts(rows, plan, split)
    new = (f.shard for f in facts if f.split == split and f.shard)
    return SplitInfo(num_rows=sum(counts), class_counts=counts, shards=(*plan.kept[split], *new))


def _statistics(
    rows: Rows, plan: Plan, numeric_columns: tuple[str, ...]
) -> NumericStatistics | None:
    if not numeric_columns:
        return None
    return fit_numeric_statistics(rows.numeric_RF[_good(rows, plan, "train")], numeric_columns)


def _vocabularies(rows: Rows, plan: Plan) -> tuple[Vocabulary, ...]:
    chosen = pa.array(_good(rows, plan, "train"))

    def fit(name: str, texts: pa.StringArray) -> Vocabulary:
        starts = range(0, len(texts), _TEXTS_AT_ONCE)
        parts = (texts.slice(start, _TEXTS_AT_ONCE).to_pylist() for start in starts)
        return fit_vocabulary(chain.from_iterable(parts), name)

    return tuple(fit(name, texts.take(chosen)) for name, texts in rows.categories.items())


def _tidy(output: Folder, keep: Iterable[Shard]) -> None:
    """Remove the shards that no manifest names, and what tells how far this job has come."""
    named = {shard.path for shard in keep}
    for split in SPLITS:
        for name in list(output.names(split)):
            if PurePosixPath(name).match("part-*.parquet") and name not in named:
                output.delete(name)
    journal.clear(output)


def _print_summary(result: Manifest, plan: Plan, output: Folder) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("split")
    for label in (result.negative_label, result.positive_label):
        table.add_column(label, justify="right")
    for name in ("rows", "shards", "new", "MB"):
        table.add_column(name, justify="right")
    for split, info in result.splits.items():
        megabytes = sum(shard.num_bytes for shard in info.shards) / 1e6
        shards = len(info.shards)
        counts = (*info.class_counts, info.num_rows, shards, shards - len(plan.kept[split]))
        cells = (*counts, f"{megabytes:.1f}")
        table.add_row(split, *map(str, cells))
    console = Console(highlight=False)
    console.print(f"Prepared {output}", soft_wrap=True, markup=False)
    console.print(table)
    console.print(f"splits: {plan.note}", soft_wrap=True, markup=False)
    numbers = ", ".join(result.numeric_columns) or "none"
    console.print(f"numeric columns: {numbers}", soft_wrap=True, markup=False)
    for vocabulary in result.vocabularies:
        words = f"{vocabulary.column}: {len(vocabulary.words)} words"
        console.print(f"categorical column {words}", soft_wrap=True, markup=False)
    if result.quarantine:
        counted = ", ".join(f"{reason} {n}" for reason, n in result.quarantine.items())
        console.print(
            f"quarantine: {counted} ({output}/{QUARANTINE})", soft_wrap=True, markup=False
        )
