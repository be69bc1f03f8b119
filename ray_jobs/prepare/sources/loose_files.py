"""Finds image files in a folder or by a glob, and reads the table that assigns them to rows."""

# pyright: reportAttributeAccessIssue=false

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.config.text import count_text, names_text
from ray_jobs.prepare.cell_text import TEXT, column_text, role_text
from ray_jobs.prepare.sources.byte_range_reader import ByteRangeReader
from ray_jobs.prepare.sources.find_key import (
    describe_found,
    find_key,
    find_pattern,
    needs_key,
)
from ray_jobs.prepare.sources.image_resolver import Found, find_images, join_problems
from ray_jobs.prepare.sources.source import ImageRefs, Source
from ray_jobs.prepare.sources.source_files import Walk, open_location, require_folder
from ray_jobs.prepare.table import parse_path_pattern, require_column
from ray_jobs.prepare.table_files import open_table


def open_source(spec: PrepareSpec, may_find: bool = True) -> Source:
    """Return the rows of a table, and the files of their images.

    Without a key column or files of the default pattern, both are found by the names of the images,
    if `may_find`. With `prepare.image_separator`, the images of a row are named `1`, `2` and so on.
    """
    table, table_notes = open_table(spec.table, spec.number_rules)
    files = ImageFiles(spec.images)
    found = find_key(table, spec, files.names) if may_find and needs_key(table, spec) else {}
    source = _open(table, spec.model_copy(update=found), files)
    has_images = any(refs.has_image.any() for refs in source.images.values())
    if may_find and not found and not has_images:
        found = find_pattern(table, spec, files.names)
        source = _open(table, spec.model_copy(update=found), files) if found else source
    notes = (*files.notes, *table_notes, *describe_found(found), *source.notes)
    return replace(source, settings=found | dict(source.settings), notes=notes)


def _open(table: pa.Table, spec: PrepareSpec, files: "ImageFiles") -> Source:
    notes: list[str] = []
    cells: dict[str, pa.LargeStringArray] = {}
    if spec.image_column and spec.image_separator is not None:
        require_column(table.column_names, spec.image_column, "prepare.image_column")
        cells = _split_cells(column_text(table.column(spec.image_column)), spec, notes)
    paths = cells or {n: _image_paths(table, spec, n) for n in spec.image_columns or ("",)}
    found = {name: files.find(of_image) for name, of_image in paths.items()}
    quarantined, guesses = join_problems(found)
    if "" in paths:
        columns = [spec.image_column] if spec.image_column else parse_path_pattern(spec)[0]
        for column in columns:
            is_empty = column_text(table.column(column)).is_null()
            detail = f"{column} is empty, so the image has no path"
            for row in np.flatnonzero(is_empty.to_numpy(zero_copy_only=False)).tolist():
                quarantined.setdefault(row, ("missing_image", detail))
    return Source(
        table,
        {name: ImageRefs(of_image.files) for name, of_image in found.items()},
        dict.fromkeys(found, ByteRangeReader(files.folder)),
        quarantined=quarantined,
        settings={"image_columns": tuple(cells)} if cells else {},
        notes=(*notes, *guesses),
    )


class ImageFiles:
    """The images in a folder, or those that a glob such as `photos/**/*.jpg` matches.

    Args:
        location: Folder, glob or URI of either.

    Raises:
        JobError: If the folder does not exist, or the glob matches no file.
    """

    def __init__(self, location: str) -> None:
        self.folder, self._patterns = open_location(location)
        require_folder(self.folder, location)
        self._walk = Walk(self.folder, self._patterns)
        self._names: pa.LargeStringArray | None = None
        if self._patterns and not len(self.names()):
            raise JobError(
                f"prepare.images={location!r} matches no file; a glob must "
                "match the images themselves, such as 'photos/*/*.jpg'"
            )

    @property
    def notes(self) -> tuple[str, ...]:
        """What was skipped when the folder was listed."""
        return self._walk.notes

    def find(self, paths: pa.LargeStringArray) -> Found:
        """Return the files of some images, as `find_images` does.

        Args:
            paths: Paths relative to the folder, or absolute paths or URIs inside it. With a glob,
                also file names or the ends of paths.
        """
        return find_images(paths, self.folder, self.names, in_glob=bool(self._patterns))

    def names(self) -> pa.LargeStringArray:
        """Return the paths of all files below the folder; the folder is listed once."""
        if self._names is None:
            self._names = pa.array(self._walk.names(), TEXT)
        return self._names


def _image_paths(table: pa.Table, spec: PrepareSpec, name: str) -> pa.LargeStringArray:
    """Return each row's path of an image, null where a cell in it is empty."""
    if spec.image_column and not name:
        require_column(table.column_names, spec.image_column, "prepare.image_column")
        return column_text(table.column(spec.image_column))
    if name and name in table.column_names:
        return column_text(table.column(name))
    if name and "{image}" not in spec.image_pattern:
        raise JobError(
            f"prepare.image_columns names {name!r}, but the table has no such column "
            f"(it has: {names_text(table.column_names)}) and prepare.image_pattern="
            f"{spec.image_pattern!r} has no {{image}} to replace; add one of them"
        )
    columns, texts, formats = parse_path_pattern(spec, name)
    joined: list[pa.LargeStringArray | pa.Scalar] = [pa.scalar(texts[0], TEXT)]
    for column, text, num_digits in zip(columns, texts[1:], formats, strict=True):
        setting = "key_column" if column == spec.key_column else "image_pattern"
        require_column(table.column_names, column, f"prepare.{setting}")
        cells = role_text(table, column, spec, keep_words=True)
        if num_digits is not None:
            cells = _pad(cells, num_digits)
        joined += [cells, pa.scalar(text, TEXT)]
    separator = pa.scalar("", TEXT)
    return pc.binary_join_element_wise(*joined, separator, null_handling="emit_null")


def _pad(cells: pa.LargeStringArray, num_digits: int) -> pa.LargeStringArray:
    """Return integers with at least this number of digits, other texts as they are."""
    digits = pc.replace_substring_regex(cells, "^0+([0-9])", r"\1")
    padded = pc.utf8_lpad(digits, num_digits, "0")
    return pc.if_else(pc.match_substring_regex(cells, "^[0-9]+$"), padded, cells)


def _split_cells(
    cells: pa.LargeStringArray, spec: PrepareSpec, notes: list[str]
) -> dict[str, pa.LargeStringArray]:
    """Return the first, second, … path of each cell by image name, null where there are fewer.

    The number of images is that of `prepare.image_columns`, if it is already known.
    """
    separator = spec.image_separator or ""
    setting = f"prepare.image_separator={separator!r}"
    if not separator:
        raise JobError(f"{setting} is empty; give the text between two paths, such as ';'")
    lists = pc.split_pattern(cells, separator)
    row_of = pc.list_parent_indices(lists).to_numpy()
    paths = pc.utf8_trim_whitespace(pc.list_flatten(lists))
    filled = np.flatnonzero(pc.not_equal(paths, "").to_numpy(zero_copy_only=False))
    row_of = row_of[filled]
    # The position of each path in its cell.
    position = np.arange(len(filled)) - np.searchsorted(row_of, row_of)
    longest = int(position.max(initial=0)) + 1
    names = spec.image_columns
    if not names and longest == 1:
        example = cells.drop_null().slice(0, 1).to_pylist()
        raise JobError(
            f"{setting} separates no paths in the column {spec.image_column!r}"
            f"{f', which has cells such as {example[0]!r}' if example else ''}; correct it, or "
            "leave it out"
        )
    names = names or tuple(str(n) for n in range(1, longest + 1))
    num_longer = len(np.unique(row_of[position >= len(names)]))
    if num_longer:
        notes.append(
            f"{count_text(num_longer, 'row')} with more than {count_text(len(names), 'image')}; "
            "the model uses the first ones"
        )
    columns: dict[str, pa.LargeStringArray] = {}
    for index, name in enumerate(names):
        at = np.full(len(cells), -1, np.int64)
        at[row_of[position == index]] = filled[position == index]
        columns[name] = paths.take(pa.array(at, mask=at < 0))
    return columns
