"""Finds the image file that each path in a table means.

The exact path comes first. Other paths are compared in ever looser spellings until exactly one file
fits: slashes and escapes, Unicode form, letter case, extension, zeros before the last number. In
each, a path may also be the end of a file's path. A path outside the folder, such as an absolute
path of another machine, must end in the file's path below the folder.
"""

# pyright: reportAttributeAccessIssue=false

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from typing import NamedTuple, TypeAlias
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from ray_jobs.prepare.cell_text import TEXT, first_rows
from ray_jobs.prepare.sources.source_files import IMAGE_SUFFIXES, map_in_threads
from ray_jobs.storage.folder import Folder

Paths: TypeAlias = pa.LargeStringArray
Quarantined = dict[int, tuple[str, str]]

MAX_CHECKED = 1000
"""Maximum number of paths to check one by one. For more, the folder is listed: an object store
lists 1,000 files per request, so that costs less than reading the images."""
_MAX_NEAREST = 100
"""Maximum number of paths to search the nearest file for."""
_NEIGHBOURS = 25
_SUFFIX = "|".join(re.escape(suffix) for suffix in IMAGE_SUFFIXES)
_LOOSE = (2, 4, 5, 6)
"""The `_spellings` that differ in the extension or in zeros."""
_UNUSUAL = r"""[\\%"':?#~\s\x{a0}]|\.\.|\./|//|/$"""
"""What a path contains if `_clean` changes more of it than `_plain`."""
_STEM = rf"(?s)^(?P<stem>.*?)(?P<suffix>(?i:{_SUFFIX})*)$"


class Found(NamedTuple):
    """The files of some paths."""

    files: Paths
    """Path below the folder; null where no file or more than one fits."""
    problems: Quarantined
    """Row → reason and detail, for each path without a file: `image_outside_folder`,
    `missing_image` or `ambiguous_image`."""
    notes: tuple[str, ...]
    """How many images were found by another spelling of their path."""


def find_images(
    paths: Paths, folder: Folder, list_files: Callable[[], Paths], in_glob: bool = False
) -> Found:
    """Return the file of each path.

    Args:
        paths: Paths relative to the folder, or any spelling of them; null where there is none.
        folder: Folder of the files.
        list_files: Returns the files in the folder. Not called if there are at most `MAX_CHECKED`
            different paths and all of them exist, unless `in_glob`.
        in_glob: Whether the files are those that a glob matches, so that no other file counts.
    """
    encoded = paths.dictionary_encode()
    # One entry per different path from here on.
    texts, codes = encoded.dictionary, encoded.indices.fill_null(-1).to_numpy()
    exact = _plain(_below_folder(texts, folder))
    if not in_glob and len(texts) <= MAX_CHECKED and _are_files(exact, folder).all():
        return Found(exact.take(encoded.indices), {}, ())
    matcher = _Matcher(texts, exact, list_files(), folder, in_glob)
    matcher.match_spellings()
    matcher.reject_shared()
    if not in_glob:
        matcher.match_unlisted()
    match = np.where(codes < 0, -1, matcher.match[codes]) if len(texts) else codes
    problems = matcher.problems()
    bad = np.flatnonzero((codes >= 0) & (match < 0)).tolist()
    return Found(
        matcher.files.take(pa.array(match, mask=match < 0)),
        {row: problems[codes[row]] for row in bad},
        matcher.notes(codes),
    )


def join_problems(found: Mapping[str, Found]) -> tuple[Quarantined, tuple[str, ...]]:
    """Return the problems of rows, given those of their images by name, and notes.

    One of several images of a row may be missing.
    """
    quarantined: Quarantined = {}
    missing: dict[int, list[str]] = {}
    notes: list[str] = []
    for name, (_, problems, of_image) in found.items():
        prefix = f"{name}: " if name else ""
        notes += [prefix + note for note in of_image]
        lost = [row for row, (reason, _) in problems.items() if name and reason == "missing_image"]
        if lost:
            notes.append(f"{prefix}{len(lost):,} missing, such as {problems[lost[0]][1]}")
        for row, (reason, detail) in problems.items():
            if name and reason == "missing_image":
                missing.setdefault(row, []).append(prefix + detail)
            else:
                quarantined.setdefault(row, (reason, prefix + detail))
    if missing:
        has_image = np.any([f.files.is_valid().to_numpy(False) for f in found.values()], axis=0)
        for row in missing.keys() - set(np.flatnonzero(has_image).tolist()):
            quarantined.setdefault(row, ("missing_image", "; ".join(missing[row])))
    return quarantined, tuple(notes)


class _Matcher:
    """Matches different paths to files."""

    def __init__(
        self, texts: Paths, exact: Paths, files: Paths, folder: Folder, in_glob: bool
    ) -> None:
        self.texts, self.exact, self.files, self.folder = texts, exact, files, folder
        self.in_glob = in_glob
        self.match = pc.index_in(exact, value_set=files).fill_null(-1).to_numpy().astype(np.int64)
        """Index of each path's file; -1 for none."""
        self.is_guess = np.zeros(len(texts), bool)
        """Whether the file was found by another spelling of the path."""
        self.is_loose = np.zeros(len(texts), bool)
        """Whether the file's name lacks a part of the path."""
        self.ambiguous: dict[int, str] = {}

    def match_spellings(self) -> None:
        """Match the paths that are not exactly those of a file, strictest spelling first."""
        unmatched = np.flatnonzero(self.match < 0)
        if not len(unmatched) or not len(self.files):
            return
        texts, clean = (p.take(pa.array(unmatched)) for p in (self.texts, self.exact))
        is_unusual = pc.match_substring_regex(texts, _UNUSUAL)
        cleaned = _clean(texts.filter(is_unusual), self.folder)
        clean = pc.replace_with_mask(clean, is_unusual, cleaned)
        clean = _without_parents(clean, self.folder, self.files)
        is_foreign = pc.starts_with(clean, "/").to_numpy(zero_copy_only=False)
        own_keys, file_keys = _spellings(pc.utf8_ltrim(clean, "/")), _spellings(self.files)
        for level, (wanted, files) in enumerate(zip(own_keys, file_keys, strict=True)):
            is_open = (self.match[unmatched] < 0) & ~np.isin(unmatched, [*self.ambiguous])
            todo = np.flatnonzero(is_open)
            if not len(todo):
                break
            own, foreign = wanted.take(pa.array(todo)), is_foreign[todo]
            first, last = _search(own, foreign, files)
            for i in np.flatnonzero(first != last).tolist():
                one, other = self.files[int(first[i])], self.files[int(last[i])]
                row = int(unmatched[todo[i]])
                self.ambiguous[row] = f"{self.texts[row]} may be {one} or {other}"
            is_clear = (first >= 0) & (first == last)
            rows, found = unmatched[todo[is_clear]], pa.array(first[is_clear])
            is_whole = pc.equal(own.filter(pa.array(is_clear)), files.take(found)).to_numpy(False)
            self.match[rows] = found
            # Globs are documented to match names without their folders.
            is_usual = ~foreign[is_clear] & ~is_whole & (self.in_glob and level == 0)
            self.is_guess[rows] = ~is_usual
            self.is_loose[rows] = foreign[is_clear] & ~is_whole | (level in _LOOSE)

    def reject_shared(self) -> None:
        """Undo guesses that give the image of one path to another path."""
        counts = np.bincount(self.match[self.match >= 0], minlength=len(self.files) + 1)
        rejected = np.flatnonzero(self.is_loose & (counts[self.match] > 1))
        for row in rejected.tolist():
            file = self.files[int(self.match[row])]
            self.ambiguous[row] = f"{self.texts[row]} may be {file}, as another path of the table"
        self.match[rejected] = -1

    def match_unlisted(self) -> None:
        """Match the paths of files that listings skip, such as hidden ones."""
        rows = np.setdiff1d(np.flatnonzero(self.match < 0), [*self.ambiguous])
        exists = _are_files(self.exact.take(pa.array(rows[:MAX_CHECKED])), self.folder)
        if exists.any() and len(rows) > MAX_CHECKED:
            exists = _are_files(self.exact.take(pa.array(rows)), self.folder)
        rows = rows[np.flatnonzero(exists)]
        self.match[rows] = len(self.files) + np.arange(len(rows))
        self.files = pa.concat_arrays([self.files, self.exact.take(pa.array(rows))])

    def problems(self) -> Quarantined:
        """Return the reason and detail of each path without a file."""
        result: Quarantined = {}
        nearest = _Nearest(self.files)
        for count, row in enumerate(np.flatnonzero(self.match < 0).tolist()):
            text, path = self.texts[row].as_py(), self.exact[row].as_py()
            if row in self.ambiguous:
                result[row] = "ambiguous_image", self.ambiguous[row]
                continue
            if re.match(r"(?i)https?://", text):
                detail = f"{text} is a URL; download the images into the folder prepare.images"
                result[row] = "image_outside_folder", detail
                continue
            try:
                self.folder.locate(path)
            except ValueError as error:
                result[row] = "image_outside_folder", str(error)
                continue
            detail = f"{text}: no such file in {self.folder}"
            if self.in_glob:
                detail = f"the glob matches no {text}"
            if count < _MAX_NEAREST and len(self.files):
                file = nearest.find(path)
                mark = re.search(r"[;|,]", path)
                if mark and file in map(str.strip, path.split(mark[0])):
                    detail += (
                        f"; set prepare.image_separator={mark[0]!r} if these are several images"
                    )
                else:
                    detail += f"; the nearest is {file}"
            result[row] = "missing_image", detail
        return result

    def notes(self, codes: np.ndarray) -> tuple[str, ...]:
        """Return how many rows have images by a guess, with examples."""
        num_rows = np.bincount(codes[codes >= 0], minlength=len(self.texts))
        rows = np.flatnonzero(self.is_guess & (self.match >= 0))
        examples = [
            f"{self.texts[i]} → {self.files[int(self.match[i])]}" for i in rows[:3].tolist()
        ]
        count = f"{num_rows[rows].sum():,} of {num_rows.sum():,} images"
        note = f"{count} found by another spelling of their path, such as {', '.join(examples)}"
        return (note,) if examples else ()


def _spellings(texts: Paths) -> Iterator[Paths]:
    """Yield the keys by which paths are compared, strictest first."""
    yield texts
    form = pc.utf8_normalize(texts, "NFC")
    yield form
    parts = pc.extract_regex(form, _STEM)
    stem, suffix = pc.struct_field(parts, "stem"), pc.utf8_lower(pc.struct_field(parts, "suffix"))
    lower = pc.utf8_lower(stem)
    number = pc.replace_substring_regex(lower, r"(^|[^0-9])0+([0-9]+[^0-9/]*)$", r"\1\2")
    for key in (stem, lower, number):
        yield pc.binary_join_element_wise(key, suffix, pa.scalar("", TEXT))
    yield lower
    yield number


def _clean(texts: Paths, folder: Folder) -> Paths:
    """Return paths with the usual slashes and without escapes; foreign ones start with a slash."""
    if pc.any(pc.match_substring_regex(texts, "%[0-9A-Fa-f]{2}")).as_py():
        texts = pa.array([unquote(text) for text in texts.to_pylist()], TEXT)
    texts = pc.utf8_trim(texts, " \t\r\n\u00a0\"'")
    texts = pc.replace_substring_regex(texts, r"^((?i:https?)://[^?#]*)[?#].*$", r"\1")
    texts = _below_folder(_plain(pc.replace_substring(texts, "\\", "/")), folder)
    # A URI, a Windows drive or a home folder; then another folder next to this one or above.
    outside = r"^(?:(?i:[a-z][a-z0-9+.-]+):/[^/]*/|/?[A-Za-z]:/*|~[^/]*/)"
    texts = pc.replace_substring_regex(texts, r"(?:^|/)[^/.][^/]*/\.\.(/|$)", "/")
    texts = pc.replace_substring_regex(texts, outside, "/")
    return pc.replace_substring_regex(texts, r"^/?(?:\.\./)+([^/.]+/)", r"/\1")


def _without_parents(texts: Paths, folder: Folder, files: Paths) -> Paths:
    """Return paths without the folder's own name, such as `photos/a.jpg` in the folder photos."""
    parents = folder.path.strip("/").split("/")
    for first in range(len(parents)):
        prefix = "/".join(parents[first:]) + "/"
        starts = pc.starts_with(texts, prefix)
        if pc.any(starts).as_py() and not pc.any(pc.starts_with(files, prefix)).as_py():
            texts = pc.if_else(starts, pc.utf8_slice_codeunits(texts, len(prefix)), texts)
    return texts


def _below_folder(texts: Paths, folder: Folder) -> Paths:
    """Return paths and URIs inside the folder relative to it, others as they are."""
    uri = folder.uri.partition("?")[0] if "://" in folder.uri else folder.uri
    for prefix in (uri, folder.path, f"file://{folder.path}", f"file:{folder.path}"):
        prefix = f"{prefix.rstrip('/')}/"
        inside = pc.utf8_slice_codeunits(texts, len(prefix))
        texts = pc.if_else(pc.starts_with(texts, prefix), inside, texts)
    return texts


def _plain(texts: Paths) -> Paths:
    """Return paths in their shortest spelling, so that each file has one."""
    texts = pc.replace_substring_regex(texts, r"/(\.?/)+", "/")
    return pc.replace_substring_regex(texts, r"^(\./)+|/\.?$", "")


def _search(wanted: Paths, is_foreign: np.ndarray, files: Paths) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and last file that fits each path; -1 for none.

    A file fits if its path is the path or else ends in it; a foreign path must end in the path of
    the file, and the longest such path fits.
    """
    first, last = np.full((2, len(wanted)), -1, np.int64)
    depths, file_depths = (pc.count_substring(p, "/").to_numpy() for p in (wanted, files))

    def match(rows: np.ndarray, depth: int, among: np.ndarray) -> None:
        """Compare the last parts of paths with those of files."""
        rows, among = rows[first[rows] < 0], np.flatnonzero(among)
        if not len(rows):
            return
        ends, keys = (
            _last_parts(p.take(pa.array(i)), depth) for p, i in ((wanted, rows), (files, among))
        )
        encoded = keys.dictionary_encode()
        codes, fitting = encoded.indices.to_numpy(), first_rows(ends, encoded.dictionary)
        rows, fitting = rows[fitting >= 0], fitting[fitting >= 0]
        file_of = np.empty(len(encoded.dictionary), np.int64)
        # The last assignment to an index counts.
        for result, step in ((first, -1), (last, 1)):
            file_of[codes[::step]] = among[::step]
            result[rows] = file_of[fitting]

    for depth in np.unique(file_depths)[::-1].tolist():
        match(np.flatnonzero(is_foreign | (depths == depth)), depth, file_depths == depth)
    for depth in np.unique(depths[~is_foreign]).tolist():
        match(np.flatnonzero(~is_foreign & (depths == depth)), depth, file_depths > depth)
    return first, last


def _last_parts(paths: Paths, depth: int) -> Paths:
    """Return the last `depth` + 1 parts of paths, the whole path where it has fewer."""
    if pc.max(pc.count_substring(paths, "/")).as_py() == depth:
        return paths
    if not depth:
        return pc.replace_substring_regex(paths, "(?s)^.*/", "")
    return pc.replace_substring_regex(paths, rf"(?s)^.*/((?:[^/]*/){{{depth}}}[^/]*)$", r"\1")


def _are_files(names: Paths, folder: Folder) -> np.ndarray:
    def is_file(name: str) -> bool:
        try:
            return folder.filesystem.get_file_info(folder.locate(name)).type == fs.FileType.File
        except (ValueError, OSError):
            return False

    return np.array(map_in_threads(is_file, names.to_pylist()), bool)


class _Nearest:
    """Finds similar paths; sorts the files only if it is used."""

    def __init__(self, files: Paths) -> None:
        self._files = files

    @cached_property
    def _orders(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Name and path of each file, in the order of names, and the same for reversed names."""
        names = [(file.rpartition("/")[2], file) for file in self._files.to_pylist()]
        return sorted(names), sorted((name[::-1], file) for name, file in names)

    def find(self, path: str) -> str:
        """Return the most similar of the files around a path in both orders."""
        path = re.split(r"[/\\]", path)[-1] if "\\" in path else path
        name = path.rpartition("/")[2]
        around: list[str] = []
        for order, key in zip(self._orders, (name, name[::-1]), strict=True):
            at = bisect_left(order, (key, ""))
            around += [file for _, file in order[max(at - _NEIGHBOURS, 0) : at + _NEIGHBOURS]]
        return get_close_matches(path[-200:], around, n=1, cutoff=0.0)[0]
