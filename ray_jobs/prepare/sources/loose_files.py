"""Image files below a folder, or found by a glob, and a table that says which are whose.

Imports neither Ray nor TensorFlow.
"""

# pyarrow makes the functions of its compute module when it is imported, unseen by pyright.
# pyright: reportAttributeAccessIssue=false

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import PrepareSpec
from ray_jobs.prepare.sources.containers import PieceReader
from ray_jobs.prepare.sources.refs import ImageRefs, Source
from ray_jobs.prepare.table import path_pattern, read_table, require_column, texts_of
from ray_jobs.storage.folder import Folder, expand_braces, glob_regex, split_glob

Bad = dict[int, tuple[str, str]]


def open_source(
    spec: PrepareSpec, categorical: Sequence[str] = (), labelled: bool = True
) -> Source:
    """Return the rows of a table and the files that hold their images.

    Raises:
        JobError: if there is no such table, folder or column, or the glob finds nothing.
    """
    table = read_table(spec.table)
    names = spec.image_columns or ("",)
    patterns = {name: _pattern(table, spec, name) for name in names}
    files = ImageFiles(spec.images)
    reader = PieceReader(files.folder, in_containers=False)
    images: dict[str, ImageRefs] = {}
    bad: Bad = {}
    for name, (columns, texts) in patterns.items():
        cells = [texts_of(table.column(column)) for column in columns]
        paths, wrong = files.find(_joined(cells, texts))
        if not name:
            # An empty cell is bad where there is but one image; of several, that one is missing.
            for column, cell in zip(columns, cells, strict=True):
                for row in np.flatnonzero(cell.is_null().to_numpy(zero_copy_only=False)).tolist():
                    detail = f"{column} is empty, so the image has no path"
                    bad.setdefault(row, ("missing_image", detail))
        for row, (reason, detail) in wrong.items():
            if not name:
                bad.setdefault(row, (reason, detail))
            elif reason != "missing_image":
                bad.setdefault(row, (reason, f"{name}: {detail}"))
        images[name] = ImageRefs(paths)
    return Source(table, images, dict.fromkeys(names, reader), bad=bad)


class ImageFiles:
    """The images below a folder, or those that a glob such as `photos/**/*.jpg` finds.

    Args:
        location: folder, glob or URI of either.

    Raises:
        JobError: if there is no such folder, or the glob finds nothing.
    """

    def __init__(self, location: str) -> None:
        if not location:
            raise JobError("prepare.images is not set: give the folder, glob or URI of the images")
        base, pattern = split_glob(location)
        self.folder = Folder(base)
        if not _is_folder(self.folder):
            raise JobError(f"prepare.images={location!r}: there is no folder {self.folder}")
        self._found: pa.StringArray | None = None
        if pattern:
            globs = [re.compile(glob_regex(one)) for one in expand_braces(pattern)]
            found = [n for n in self.folder.names() if any(g.fullmatch(n) for g in globs)]
            self._found = pa.array(found, pa.string())
            if not found:
                raise JobError(f"prepare.images={location!r} finds no file")

    def find(self, paths: pa.StringArray) -> tuple[pa.StringArray, Bad]:
        """Return the paths below `folder` of some images, null where there is none, and why.

        Reasons are `image_outside_folder`, `missing_image` and `ambiguous_image`. Whether there is
        such a file in a folder shows only when it is read.

        Args:
            paths: below the folder, by URI or absolute inside it; in a glob's findings also the
                file's name alone, or the end of its path.
        """
        for prefix in (self.folder.uri, self.folder.path):
            prefix = f"{prefix.rstrip('/')}/"
            inside = pc.utf8_slice_codeunits(paths, len(prefix))
            paths = pc.if_else(pc.starts_with(paths, prefix), inside, paths)
        bad: Bad = {}
        suspicious = pc.match_substring_regex(paths, r"^/|\.\.|^[./]*$").fill_null(False)
        for row in np.flatnonzero(suspicious.to_numpy(zero_copy_only=False)).tolist():
            try:
                self.folder.locate(paths[row].as_py())
            except ValueError as error:
                bad[row] = ("image_outside_folder", str(error))
        paths = _without(paths, bad)
        # One image has one path, whoever names it.
        paths = pc.replace_substring_regex(paths, r"/(\.?/)+", "/")
        paths = pc.replace_substring_regex(paths, r"^(\./)+|/\.?$", "")
        if self._found is None:
            return paths, bad
        found, unclear = _match_ends(paths, self._found)
        lost = pc.and_(found.is_null(), paths.is_valid()).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(lost).tolist():
            bad[row] = unclear.get(row, ("missing_image", f"the glob finds no {paths[row]}"))
        return found, bad


def _pattern(table: pa.Table, spec: PrepareSpec, name: str) -> tuple[list[str], list[str]]:
    """Return the columns that paths are made from, and the texts around them."""
    if spec.image_column and not name:
        require_column(table, spec.image_column, "prepare.image_column")
        return [spec.image_column], ["", ""]
    if name and name in table.column_names:
        return [name], ["", ""]
    if name and "{image}" not in spec.image_pattern:
        raise JobError(
            f"prepare.image_columns names {name!r}: the table has no such column "
            f"(it has: {', '.join(table.column_names)}), and prepare.image_pattern="
            f"{spec.image_pattern!r} has no {{image}} for it to stand in"
        )
    columns, texts = path_pattern(spec, name)
    for column in columns:
        is_key = column == spec.key_column
        require_column(table, column, f"prepare.{'key_column' if is_key else 'image_pattern'}")
    return columns, texts


def _joined(cells: Sequence[pa.StringArray], texts: Sequence[str]) -> pa.StringArray:
    """Return the texts with the cells between them, null where a cell is."""
    pieces: list[pa.StringArray | str] = [texts[0]]
    for cell, text in zip(cells, texts[1:], strict=True):
        pieces += [cell, text]
    return pc.binary_join_element_wise(*pieces, "", null_handling="emit_null")


def _without(paths: pa.StringArray, rows: Bad) -> pa.StringArray:
    """Return the paths with some of them null."""
    if not rows:
        return paths
    mask = np.zeros(len(paths), bool)
    mask[list(rows)] = True
    return pc.if_else(pa.array(mask), None, paths)


def _match_ends(paths: pa.StringArray, files: pa.StringArray) -> tuple[pa.StringArray, Bad]:
    """Return the file whose path ends in each path, null where none or more than one does."""
    depths = pc.count_substring(paths, "/").fill_null(-1).to_numpy()
    places = np.full(len(paths), -1, np.int64)
    unclear: Bad = {}
    for depth in np.unique(depths[depths >= 0]).tolist():
        deep = files.filter(pc.greater_equal(pc.count_substring(files, "/"), depth))
        start = rf"(?s)^(?:.*/)?(?P<end>(?:[^/]*/){{{depth}}}[^/]*)$"
        ends = pc.struct_field(pc.extract_regex(deep, start), "end")
        rows = np.flatnonzero(depths == depth)
        wanted = paths.take(pa.array(rows))
        first = pc.index_in(wanted, value_set=ends).fill_null(-1).to_numpy()
        # Searched from the other side, a file is the same one only where no other ends alike.
        last = pc.index_in(wanted, value_set=ends[::-1]).fill_null(-1)
        last = np.where(first < 0, -1, len(ends) - 1 - last.to_numpy())
        for i in np.flatnonzero(first != last).tolist():
            row, one, other = int(rows[i]), deep[int(first[i])], deep[int(last[i])]
            unclear[row] = ("ambiguous_image", f"{paths[row]} may be {one} or {other}")
        in_files = pc.index_in(deep, value_set=files).to_numpy()
        is_clear = (first >= 0) & (first == last)
        places[rows[is_clear]] = in_files[first[is_clear]]
    return files.take(pa.array(places, mask=places < 0)), unclear


def _is_folder(folder: Folder) -> bool:
    return folder.filesystem.get_file_info(folder.path).type == fs.FileType.Directory
