"""Finds image files in a folder or by a glob, and reads the table that assigns them to rows."""

# pyright: reportAttributeAccessIssue=false

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.config.text import names_text
from ray_jobs.prepare.cell_text import TEXT, column_text
from ray_jobs.prepare.sources.byte_range_reader import ByteRangeReader
from ray_jobs.prepare.sources.source import ImageRefs, Source
from ray_jobs.prepare.sources.source_files import open_folder
from ray_jobs.prepare.table import parse_path_pattern, read_table, require_column
from ray_jobs.storage.folder import expand_braces, glob_regex, split_glob

Quarantined = dict[int, tuple[str, str]]


def open_source(spec: PrepareSpec) -> Source:
    """Return the rows of a table, and the files of their images."""
    table = read_table(spec.table)
    names = spec.image_columns or ("",)
    patterns = {name: _path_pattern(table, spec, name) for name in names}
    files = ImageFiles(spec.images)
    images: dict[str, ImageRefs] = {}
    quarantined: Quarantined = {}
    for name, (columns, texts) in patterns.items():
        cells = [column_text(table.column(column)) for column in columns]
        paths, problems = files.find(_join_text(cells, texts))
        images[name] = ImageRefs(paths)
        if name:
            # One of several images may be missing.
            problems = {
                row: (reason, f"{name}: {detail}")
                for row, (reason, detail) in problems.items()
                if reason != "missing_image"
            }
        else:
            for column, cell in zip(columns, cells, strict=True):
                detail = f"{column} is empty, so the image has no path"
                for row in np.flatnonzero(cell.is_null().to_numpy(zero_copy_only=False)).tolist():
                    problems.setdefault(row, ("missing_image", detail))
        quarantined = problems | quarantined
    readers = dict.fromkeys(names, ByteRangeReader(files.folder))
    return Source(table, images, readers, quarantined=quarantined)


class ImageFiles:
    """The images in a folder, or those that a glob such as `photos/**/*.jpg` matches.

    Args:
        location: Folder, glob or URI of either.

    Raises:
        JobError: If the folder does not exist, or the glob matches no file.
    """

    def __init__(self, location: str) -> None:
        base, pattern = split_glob(location)
        self.folder = open_folder(base)
        self._matched: pa.LargeStringArray | None = None
        if pattern:
            globs = [re.compile(glob_regex(each)) for each in expand_braces(pattern)]
            matched = [n for n in self.folder.names() if any(g.fullmatch(n) for g in globs)]
            if not matched:
                raise JobError(
                    f"prepare.images={location!r} matches no file; a glob must "
                    "match the images themselves, such as 'photos/*/*.jpg'"
                )
            self._matched = pa.array(matched, TEXT)

    def find(self, paths: pa.LargeStringArray) -> tuple[pa.LargeStringArray, Quarantined]:
        """Return the paths of some images below `folder`, null where unusable, and the reasons.

        Reasons are `image_outside_folder`, `missing_image` and `ambiguous_image`. Without a glob,
        a missing file is noticed only when it is read.

        Args:
            paths: Paths relative to the folder, or absolute paths or URIs inside it. With a glob,
                also file names or the ends of paths.
        """
        for prefix in (self.folder.uri, self.folder.path):
            prefix = f"{prefix.rstrip('/')}/"
            inside = pc.utf8_slice_codeunits(paths, len(prefix))
            paths = pc.if_else(pc.starts_with(paths, prefix), inside, paths)
        problems: Quarantined = {}
        is_suspicious = pc.match_substring_regex(paths, r"^/|\.\.|^[./]*$").fill_null(False)
        is_outside = np.zeros(len(paths), bool)
        for row in np.flatnonzero(is_suspicious.to_numpy(zero_copy_only=False)).tolist():
            try:
                self.folder.locate(paths[row].as_py())
            except ValueError as error:
                problems[row] = ("image_outside_folder", str(error))
                is_outside[row] = True
        paths = pc.if_else(pa.array(is_outside), None, paths)
        # Normalize the paths, so that each image has one path.
        paths = pc.replace_substring_regex(paths, r"/(\.?/)+", "/")
        paths = pc.replace_substring_regex(paths, r"^(\./)+|/\.?$", "")
        if self._matched is None:
            return paths, problems
        files, ambiguous = _match_path_ends(paths, self._matched)
        is_lost = pc.and_(files.is_null(), paths.is_valid()).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(is_lost).tolist():
            missing = ("missing_image", f"the glob matches no {paths[row]}")
            problems[row] = ambiguous.get(row, missing)
        return files, problems


def _path_pattern(table: pa.Table, spec: PrepareSpec, name: str) -> tuple[list[str], list[str]]:
    """Return the columns that make up an image's path, and the texts around them."""
    if spec.image_column and not name:
        require_column(table.column_names, spec.image_column, "prepare.image_column")
        return [spec.image_column], ["", ""]
    if name and name in table.column_names:
        return [name], ["", ""]
    if name and "{image}" not in spec.image_pattern:
        raise JobError(
            f"prepare.image_columns names {name!r}, but the table has no such column "
            f"(it has: {names_text(table.column_names)}) and prepare.image_pattern="
            f"{spec.image_pattern!r} has no {{image}} to replace; add one of them"
        )
    columns, texts = parse_path_pattern(spec, name)
    for column in columns:
        setting = "key_column" if column == spec.key_column else "image_pattern"
        require_column(table.column_names, column, f"prepare.{setting}")
    return columns, texts


def _join_text(cells: Sequence[pa.LargeStringArray], texts: Sequence[str]) -> pa.LargeStringArray:
    """Return the texts with the cells between them, null where a cell is null."""
    joined: list[pa.LargeStringArray | pa.Scalar] = [pa.scalar(texts[0], TEXT)]
    for cell, text in zip(cells, texts[1:], strict=True):
        joined += [cell, pa.scalar(text, TEXT)]
    separator = pa.scalar("", TEXT)
    return pc.binary_join_element_wise(*joined, separator, null_handling="emit_null")


def _match_path_ends(
    paths: pa.LargeStringArray, files: pa.LargeStringArray
) -> tuple[pa.LargeStringArray, Quarantined]:
    """Return the file whose path ends in each path, null where none or more than one does."""
    depths = pc.count_substring(paths, "/").fill_null(-1).to_numpy()
    matches = np.full(len(paths), -1, np.int64)
    ambiguous: Quarantined = {}
    for depth in np.unique(depths[depths >= 0]).tolist():
        deep = files.filter(pc.greater_equal(pc.count_substring(files, "/"), depth))
        pattern = rf"(?s)^(?:.*/)?(?P<end>(?:[^/]*/){{{depth}}}[^/]*)$"
        ends = pc.struct_field(pc.extract_regex(deep, pattern), "end")
        rows = np.flatnonzero(depths == depth)
        wanted = paths.take(pa.array(rows))
        first = pc.index_in(wanted, value_set=ends).fill_null(-1).to_numpy()
        # A search from the other side finds the same file unless another has the same end.
        last = pc.index_in(wanted, value_set=ends[::-1]).fill_null(-1)
        last = np.where(first < 0, -1, len(ends) - 1 - last.to_numpy())
        for i in np.flatnonzero(first != last).tolist():
            row, one, other = int(rows[i]), deep[int(first[i])], deep[int(last[i])]
            ambiguous[row] = ("ambiguous_image", f"{paths[row]} may be {one} or {other}")
        in_files = pc.index_in(deep, value_set=files).to_numpy()
        is_clear = (first >= 0) & (first == last)
        matches[rows[is_clear]] = in_files[first[is_clear]]
    return files.take(pa.array(matches, mask=matches < 0)), ambiguous
