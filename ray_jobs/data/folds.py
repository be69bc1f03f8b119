"""Divides stored rows into folds for cross-validation.

Input: the training and the validation split of prepared data. Output: a manifest for each fold,
whose splits are selections of these rows:

    test         the scored fold
    validation   rows cut from the other folds, for early stopping, blend, calibration and threshold
    train        all other rows, which also determine statistics and vocabularies (but not the words
                 of texts, which all folds share)

Rows of a group stay together, as do rows that share an image if there is no group column. Imports
neither Ray nor TensorFlow.

    N rows   C numeric columns
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa

from mm_model.statistics import fit_numeric_statistics, fit_vocabulary
from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS
from ray_jobs.data.batch import FOLD, GROUP, KEY, LABEL, WEIGHT
from ray_jobs.data.manifest import Manifest, Shard, SplitInfo
from ray_jobs.data.reader import ShardReader
from ray_jobs.storage.folder import Folder

DEFAULT_FOLDS = 5


@dataclass(frozen=True)
class FoldRows:
    """The N rows that are divided into folds, in stored order."""

    manifest: Manifest
    """The manifest of the prepared data."""
    table: pa.Table
    """All columns except for images."""
    group_N: np.ndarray
    """Index of each row's group."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards with the rows."""
        splits = self.manifest.splits
        return (*splits["train"].shards, *splits["validation"].shards)

    @property
    def label_N(self) -> np.ndarray:
        """Labels, 0 or 1."""
        return self.table[LABEL].to_numpy()

    @property
    def weight_N(self) -> np.ndarray | None:
        """Weights of the rows, or None."""
        return self.table[WEIGHT].to_numpy() if self.manifest.is_weighted else None


@dataclass(frozen=True)
class Fold:
    """Which rows train, validate and score one model."""

    repeat: int
    index: int
    is_train_N: np.ndarray
    is_validation_N: np.ndarray
    is_scored_N: np.ndarray

    @property
    def name(self) -> str:
        """Name of the fold's folder."""
        return f"{self.repeat + 1}-{self.index + 1}"


def read_fold_rows(folder: Folder, manifest: Manifest) -> FoldRows:
    """Read the rows of the training and validation split.

    Raises:
        JobError: If the shards were prepared before groups were stored.
    """
    prepare, image = manifest.prepare, manifest.image
    categories = [vocabulary.column for vocabulary in manifest.vocabularies]
    optional = {
        FOLD: prepare.fold_column,
        GROUP: prepare.group_column,
        WEIGHT: prepare.weight_column,
    }
    columns = [KEY, LABEL, *manifest.numeric_columns, *categories]
    columns += [name for name, column in optional.items() if column]
    by_image = [] if prepare.group_column else image.columns
    rows = FoldRows(manifest, pa.table({}), np.array([]))
    reader = ShardReader(folder, rows.shards, [*columns, *by_image])
    tables: list[pa.Table] = []
    names: list[list[Any]] = [[] for _ in range(len(by_image) or 1)]
    for shard, info in enumerate(rows.shards):
        for group in range(len(info.row_groups)):
            (table,) = reader.read_groups(shard, [group])
            if missing := [name for name in columns if name not in table.column_names]:
                raise JobError(
                    f"{folder}/{info.path} has no column {missing[0]!r}, because it was prepared "
                    "by an earlier version of the program; prepare the data again"
                )
            for column, hashes in zip(by_image, names, strict=False):
                hashes += [_hash(image) for image in table[column].to_pylist()]
            if not by_image:
                names[0] += table[GROUP].to_pylist()
            tables.append(table.select(columns))
    return FoldRows(manifest, pa.concat_tables(tables), _join(names))


def make_folds(
    rows: FoldRows, num_folds: int | None, num_repeats: int, seed: int, section: str = "cv"
) -> list[Fold]:
    """Return the folds of all repeats.

    Args:
        rows: The rows to divide.
        num_folds: Number of folds; by default, those of the fold column, else 5.
        num_repeats: How many times to divide the rows, differently each time.
        seed: Seed of the divisions.
        section: Section of the settings, for messages.

    Raises:
        JobError: If the settings do not fit the fold column, or a fold would lack a class.
    """
    given_N = None
    if FOLD in rows.table.column_names:
        given = rows.table[FOLD].to_pylist()
        are_numbers = all(word.isdecimal() for word in given)
        words = sorted(set(given), key=int if are_numbers else str)
        given_N = np.array([words.index(word) for word in given])
        column = rows.manifest.prepare.fold_column
        if num_folds not in (None, len(words)) or num_repeats > 1:
            setting = f"{section}.repeats" if num_repeats > 1 else f"{section}.folds"
            raise JobError(
                f"{setting} does not fit the {len(words)} folds of the column {column}; leave it "
                "out, or prepare the data without prepare.fold_column"
            )
        num_folds = len(words)
    num_folds = num_folds or DEFAULT_FOLDS
    all_N = np.ones(len(rows.label_N), bool)
    if given_N is None and (rarest := _rarest(rows, all_N)) < num_folds:
        raise JobError(
            f"{section}.folds={num_folds} needs as many rows, or groups, of each class, but one "
            f"class has {rarest}; lower {section}.folds"
        )
    fraction = rows.manifest.prepare.validation_fraction
    folds: list[Fold] = []
    for repeat in range(num_repeats):
        fold_N = given_N
        if fold_N is None:
            fold_N = _divide(rows, all_N, num_folds, (seed, repeat))
        for index in range(num_folds):
            is_scored_N = fold_N == index
            # With few rows of a class, a larger part has one of each class.
            num_parts = max(2, min(round(1 / fraction), _rarest(rows, ~is_scored_N)))
            part_N = _divide(rows, ~is_scored_N, num_parts, (seed, repeat, index))
            fold = Fold(repeat, index, part_N > 0, part_N == 0, is_scored_N)
            _require_both_classes(rows, fold, num_folds, section)
            folds.append(fold)
    return folds


def fold_manifest(rows: FoldRows, fold: Fold) -> Manifest:
    """Return the manifest of a fold, whose shards are in the folder of the prepared data."""
    return select_rows(rows, fold.is_train_N, fold.is_validation_N, fold.is_scored_N)


def select_rows(rows: FoldRows, train_N: np.ndarray, *others_N: np.ndarray) -> Manifest:
    """Return a manifest whose splits are selections of the rows.

    Args:
        rows: The rows.
        train_N: Which rows train; they determine statistics and vocabularies.
        *others_N: Which rows are in the validation and test split; by default, none.
    """
    manifest, train = rows.manifest, rows.table.filter(pa.array(train_N))
    empty_N = np.zeros(len(train_N), bool)
    selections = dict(zip_longest(SPLITS, (train_N, *others_N), fillvalue=empty_N))
    changes: dict[str, Any] = {
        "splits": {split: _select(rows, selected) for split, selected in selections.items()},
        "vocabularies": tuple(
            fit_vocabulary(train[v.column].to_pylist(), v.column) for v in manifest.vocabularies
        ),
        "cuts": None,
    }
    if names := manifest.numeric_columns:
        numbers_NC = np.stack([train[name].to_numpy() for name in names], axis=1)
        changes["statistics"] = fit_numeric_statistics(numbers_NC, names)
    return manifest.model_copy(update=changes)


def _divide(
    rows: FoldRows, is_used_N: np.ndarray, num_parts: int, seed: tuple[int, ...]
) -> np.ndarray:
    """Return the part of each used row, stratified by label, with whole groups; else -1."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    label, group = rows.label_N[is_used_N], rows.group_N[is_used_N]
    is_grouped = len(np.unique(group)) < len(group)
    random_state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    splitter = (StratifiedGroupKFold if is_grouped else StratifiedKFold)(
        num_parts, shuffle=True, random_state=random_state
    )
    part, part_N = np.zeros(len(label), np.int64), np.full(len(rows.label_N), -1)
    parts = splitter.split(label, label, group if is_grouped else None)
    for index, (_, chosen) in enumerate(parts):
        part[chosen] = index
    part_N[is_used_N] = part
    return part_N


def _rarest(rows: FoldRows, is_used_N: np.ndarray) -> int:
    """Return the number of rows, or groups, with the rarer label."""
    label, group = rows.label_N[is_used_N], rows.group_N[is_used_N]
    return min(len(np.unique(group[label == value])) for value in (0, 1))


def _require_both_classes(rows: FoldRows, fold: Fold, num_folds: int, section: str) -> None:
    for name in ("train", "validation", "scored"):
        counts = np.bincount(rows.label_N[getattr(fold, f"is_{name}_N")], minlength=2)
        if not counts.all():
            raise JobError(
                f"the {name} rows of fold {fold.index + 1} of {num_folds} have only one class; "
                f"lower {section}.folds, or change prepare.fold_column"
            )


def _select(rows: FoldRows, selected_N: np.ndarray) -> SplitInfo:
    ends = np.cumsum([shard.num_rows for shard in rows.shards])
    parts = np.split(selected_N, ends[:-1])
    label, weights = rows.label_N[selected_N], None
    counts = np.bincount(label, minlength=2).tolist()
    if rows.weight_N is not None:
        weights = tuple(np.bincount(label, rows.weight_N[selected_N], minlength=2).tolist())
    shards = (shard.select(part) for shard, part in zip(rows.shards, parts, strict=True))
    return SplitInfo(
        num_rows=len(label),
        class_counts=(counts[0], counts[1]),
        class_weights=weights,
        shards=tuple(shard for shard in shards if shard.num_rows),
    )


def _hash(image: bytes | None) -> bytes | None:
    return None if image is None else hashlib.blake2b(image, digest_size=16).digest()


def _join(names: list[list[Any]]) -> np.ndarray:
    """Return the index of each row's group: rows with an equal name in a column are together."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_rows = len(names[0])
    first = np.arange(num_rows)
    edges = [(i, j) for column in names for i, j in _equal_pairs(column)]
    row, other = np.array([*zip(first, first, strict=True), *edges]).T
    graph = coo_array((np.ones(len(row), bool), (row, other)), (num_rows, num_rows))
    return connected_components(graph, directed=False)[1]


def _equal_pairs(names: list[Any]) -> Iterator[tuple[int, int]]:
    """Yield each row with the first one of the same name; None is different from everything."""
    first: dict[Any, int] = {}
    for row, name in enumerate(names):
        if name is not None:
            yield first.setdefault(name, row), row
