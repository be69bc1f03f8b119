"""Reads splits that the user gives: as words in a column, names of folders, or files of keys.

Output: the index in `SPLITS` of each row, and a note on where it comes from. Only words are read;
what the numbers 0, 1 and 2 mean differs between data sets.
"""

# pyright: reportAttributeAccessIssue=false

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import SPLITS, Split, TextRule
from ray_jobs.config.text import count_text
from ray_jobs.prepare.cell_text import TEXT, apply_text_rule, column_text
from ray_jobs.storage.folder import split_file

_SPELLINGS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "validate", "dev", "eval"),
    "test": ("test", "testing", "tst"),
}
_SPLITS: dict[str, Split] = {word: split for split, words in _SPELLINGS.items() for word in words}


def split_named(word: str) -> Split | None:
    """Return the split that a word names, such as validation for `Val`; None for another word."""
    return _SPLITS.get(word.strip().casefold())


def read_split_words(texts: pa.LargeStringArray) -> np.ndarray:
    """Return the split of each text as its index in `SPLITS`, -1 where it names none."""
    encoded = texts.dictionary_encode()
    # The last entry is for null cells, whose code is -1.
    named = [*map(split_named, encoded.dictionary.to_pylist()), None]
    splits = np.array([SPLITS.index(split) if split else -1 for split in named], np.int8)
    return splits[encoded.indices.fill_null(-1).to_numpy()]


def describe_bad_word(word: str | None) -> str:
    """Return why a cell names no split."""
    accepted = (", ".join(words) for words in _SPELLINGS.values())
    return f"{'empty' if word is None else repr(word)}, not one of {'; '.join(accepted)}"


def read_split_keys(
    files: Mapping[Split, str], keys: pa.LargeStringArray, key_column: str, key_rule: TextRule
) -> tuple[np.ndarray, str]:
    """Return the split of each row by files of keys, and a note; rows in no file are train.

    Args:
        files: Path or URI of a text file by split, with one key per line.
        keys: Key of each row.
        key_column: Name of the keys' column, which may also be the first line of a file.
        key_rule: Rule of `prepare.text_rules` that the keys are read by.

    Raises:
        JobError: If a file cannot be read, has no key of the table, or has a key of another file.
    """
    splits = np.full(len(keys), -1, np.int8)
    notes: list[str] = []
    for split, location in files.items():
        setting = f"prepare.split_keys.{split}={location}"
        listed = apply_text_rule(_read_keys(location, setting, key_column), key_rule)
        is_listed = pc.is_in(keys, value_set=listed).to_numpy(zero_copy_only=False)
        if not is_listed.any():
            example = keys.drop_null()[:1].to_pylist()
            raise JobError(
                f"{setting}: none of its {count_text(len(listed), 'key')}, such as "
                f"{listed[0].as_py()!r}, is in the column {key_column!r}, which holds {example}; "
                "correct the file, or set prepare.key_column"
            )
        for row in np.flatnonzero(is_listed & (splits >= 0))[:1].tolist():
            other = SPLITS[splits[row]]
            raise JobError(
                f"{setting}: the key {keys[row].as_py()!r} is also in prepare.split_keys.{other}="
                f"{files[other]}; remove it from one of the files"
            )
        splits[is_listed] = SPLITS.index(split)
        unknown = listed.filter(pc.invert(pc.is_in(listed, value_set=keys))).unique()
        if len(unknown):
            notes.append(
                f"; {count_text(len(unknown), 'key')} of {split} not in the table, such as "
                f"{unknown[0].as_py()!r}"
            )
    if "train" in files and (num_rows := int((splits < 0).sum())):
        notes.append(f"; {count_text(num_rows, 'row')} in no file, used for training")
    return np.maximum(splits, 0), "from the files in prepare.split_keys" + "".join(notes)


def _read_keys(location: str, setting: str, key_column: str) -> pa.LargeStringArray:
    folder, name = split_file(location)
    try:
        lines = folder.read_bytes(name).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(
            f"{setting} could not be read: {error}; give a UTF-8 text file with one key per line"
        ) from error
    keys = [line for line in lines if line.strip()]
    if keys and keys[0].strip() == key_column:
        del keys[0]
    if not keys:
        raise JobError(f"{setting} is empty; write one key per line")
    return column_text(pa.chunked_array([pa.array(keys, TEXT)]))
