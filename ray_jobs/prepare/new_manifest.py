"""Makes the manifest of the planned and written shards, and checks what every split needs."""

# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from mm_model.backbones.tokenizer import fit_words
from mm_model.statistics import (
    NumericStatistics,
    Vocabulary,
    fit_numeric_statistics,
    fit_vocabulary,
)
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS, Split
from ray_jobs.config.text import count_text
from ray_jobs.data.manifest import Manifest, SplitInfo
from ray_jobs.prepare.findings import count_reasons
from ray_jobs.prepare.inputs import Inputs
from ray_jobs.prepare.row_validation import CheckedRows
from ray_jobs.prepare.shards.shard_plan import Plan
from ray_jobs.prepare.shards.shard_writer import ShardFacts, ShardWriter


def make_manifest(
    inputs: Inputs, writer: ShardWriter, plan: Plan, facts: Sequence[ShardFacts]
) -> Manifest:
    """Return the manifest.

    Args:
        inputs: What was read.
        writer: The writer of the shards.
        plan: The plan of splits and shards.
        facts: The written shards; none in a dry run.
    """
    rows, texts = inputs.rows, inputs.text_columns
    return Manifest(
        prepare=writer.spec,
        seed=writer.seed,
        image=writer.image,
        columns=inputs.columns,
        numeric_columns=writer.numeric_columns,
        vocabularies=_fit_vocabularies(rows, plan, texts),
        text_columns=texts,
        text_words=_fit_text_words(rows, plan, texts),
        negative_label=inputs.classes.negative,
        positive_label=inputs.classes.positive,
        splits={split: _split_info(rows, plan, facts, split) for split in SPLITS},
        cuts=plan.cuts,
        statistics=_fit_statistics(rows, plan, writer.numeric_columns),
        quarantine=count_reasons(rows),
    )


def require_both_classes(rows: CheckedRows, plan: Plan) -> None:
    """Check that every split has rows of both classes.

    Raises:
        JobError: If one has not.
    """
    for split in SPLITS:
        counts = _class_counts(rows, plan, split)
        if not all(counts):
            remedy = (
                f"mark rows of both classes as {split}"
                if rows.splits_note
                else "add such rows, correct those in quarantine, or, if this folder was prepared "
                "before, set another prepare.output to make new splits"
            )
            raise JobError(
                f"the {split} split would have {count_text(counts[0], 'row')} of class 0 and "
                f"{counts[1]:,} of class 1 (splits {plan.note}), but it needs both classes; "
                f"{remedy}"
            )


def _good(rows: CheckedRows, plan: Plan, split: Split) -> np.ndarray:
    return plan.members[split][rows.good[plan.members[split]]]


def _class_counts(rows: CheckedRows, plan: Plan, split: Split) -> tuple[int, int]:
    counts = np.bincount(rows.labels[_good(rows, plan, split)], minlength=2).tolist()
    return counts[0], counts[1]


def _split_info(
    rows: CheckedRows, plan: Plan, facts: Sequence[ShardFacts], split: Split
) -> SplitInfo:
    counts = _class_counts(rows, plan, split)
    new = (f.shard for f in facts if f.split == split and f.shard)
    weights = None
    if rows.weights is not None:
        good = _good(rows, plan, split)
        sums = np.bincount(rows.labels[good], rows.weights[good], minlength=2).tolist()
        weights = (sums[0], sums[1])
    return SplitInfo(
        num_rows=sum(counts),
        class_counts=counts,
        class_weights=weights,
        shards=(*plan.kept[split], *new),
    )


def _fit_statistics(
    rows: CheckedRows, plan: Plan, numeric_columns: tuple[str, ...]
) -> NumericStatistics | None:
    if not numeric_columns:
        return None
    return fit_numeric_statistics(rows.numeric_RF[_good(rows, plan, "train")], numeric_columns)


def _fit_vocabularies(
    rows: CheckedRows, plan: Plan, texts: Sequence[str]
) -> tuple[Vocabulary, ...]:
    chosen = pa.array(_good(rows, plan, "train"))
    return tuple(
        fit_vocabulary((word.as_py() for word in words.take(chosen)), name)
        for name, words in rows.categories.items()
        if name not in texts
    )


def _fit_text_words(rows: CheckedRows, plan: Plan, texts: Sequence[str]) -> tuple[str, ...]:
    chosen = pa.array(_good(rows, plan, "train"))
    return fit_words(text.as_py() for name in texts for text in rows.categories[name].take(chosen))
