"""Hashes of images and keys by split → what is there twice.

Images whose perceptual hashes differ in few bits look alike. Of three pieces of such hashes one
differs in a single bit at most (Norouzi, Punjani and Fleet, "Fast Search in Hamming Space with
Multi-Index Hashing", 2012), so only hashes that nearly share a piece are compared.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ray_jobs.config.spec import SPLITS, Split
from ray_jobs.inspect.scan import Place, ScannedSplit

NEAR_BITS = 5
"""Most bits in which the hashes of nearly the same images differ."""
FLAT_CONTRAST = 4.0
"""Images with less contrast have nothing that could look alike."""

_PIECES = ((0, 22), (22, 21), (43, 21))
"""First bit and bits of each piece of a hash."""
_COMPARE_AT_ONCE = 1 << 22
_MOST_COMPARED = 1 << 31


@dataclass(frozen=True)
class Overlap:
    """Images of the second split that are in the first, too."""

    first: Split
    second: Split
    num_exact: int
    num_near: int
    complete: bool
    pairs: tuple[tuple[Place, Place, bool, int], ...]
    """First and second image, whether they are the same, distance; the nearest first."""


def overlaps(scans: Mapping[Split, ScannedSplit], most_pairs: int) -> Iterator[Overlap]:
    """Yield what each two splits share; the later split is the second one."""
    for second in SPLITS[1:]:
        for first in SPLITS[: SPLITS.index(second)]:
            yield _overlap(first, scans[first], second, scans[second], most_pairs)


def duplicates_within(scan: ScannedSplit) -> int:
    """Return how many images have the same stored bytes as one before in the split."""
    content = scan.content_RI[scan.content_RI != 0]
    return len(content) - len(np.unique(content))


def conflicting(scans: Mapping[Split, ScannedSplit]) -> int:
    """Return how many images have stored bytes that stand in rows of both classes."""
    content = np.concatenate([scan.content_RI[scan.content_RI != 0] for scan in scans.values()])
    label = np.concatenate(
        [
            np.broadcast_to(scan.label_R[:, None], scan.content_RI.shape)[scan.content_RI != 0]
            for scan in scans.values()
        ]
    )
    both = np.intersect1d(content[label == 0], content[label == 1])
    return int(np.isin(content, both).sum())


def shared_keys(scans: Mapping[Split, ScannedSplit]) -> dict[int, list[tuple[Split, int]]]:
    """Return, by key hash, where keys stand that are in more than one split."""
    found: dict[int, list[tuple[Split, int]]] = {}
    distinct = [np.unique(scan.key_hash_R) for scan in scans.values()]
    hashes, counts = np.unique(np.concatenate(distinct), return_counts=True)
    shared = hashes[counts > 1]
    for split, scan in scans.items():
        for index in np.flatnonzero(np.isin(scan.key_hash_R, shared)):
            found.setdefault(int(scan.key_hash_R[index]), []).append((split, int(index)))
    return found


def nearest_hashes(
    first: np.ndarray, second: np.ndarray, most_compared: int = _MOST_COMPARED
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Find for each hash of the second array the nearest of the first, within `NEAR_BITS`.

    Args:
        first: distinct hashes, uint64.
        second: distinct hashes, uint64.
        most_compared: the search is cut short after as many comparisons.

    Returns:
        Place of the nearest in `first`, its distance (65 if there is none), and whether all were
        compared that had to be.
    """
    # Distance and place in one number, so that the least of them is what is looked for.
    best = np.full(len(second), 65 << 48, np.int64)
    if not len(first) or not len(second):
        return best & 0, best >> 48, True
    budget = most_compared
    for start, bits in _PIECES:
        mask = np.uint64((1 << bits) - 1)
        pieces = (first >> np.uint64(start)) & mask
        order = np.argsort(pieces, kind="stable")
        pieces = pieces[order]
        wanted = (second >> np.uint64(start)) & mask
        for flip in (0, *(1 << bit for bit in range(bits))):
            begin = np.searchsorted(pieces, wanted ^ np.uint64(flip), side="left")
            end = np.searchsorted(pieces, wanted ^ np.uint64(flip), side="right")
            for at, partner in _candidates(begin, end):
                budget -= len(at)
                if budget < 0:
                    return best & ((1 << 48) - 1), best >> 48, False
                partner = order[partner]
                distance = np.bitwise_count(first[partner] ^ second[at]).astype(np.int64)
                near = distance <= NEAR_BITS
                np.minimum.at(best, at[near], (distance[near] << 48) | partner[near])
    return best & ((1 << 48) - 1), best >> 48, True


def _candidates(begin: np.ndarray, end: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (i, j) for every j from begin[i] to end[i], as arrays of a bounded size."""
    filled = np.flatnonzero(end > begin)
    sizes = (end - begin)[filled]
    total = np.cumsum(sizes)
    position = 0
    while position < (total[-1] if len(total) else 0):
        numbers = np.arange(position, min(position + _COMPARE_AT_ONCE, int(total[-1])))
        block = np.searchsorted(total, numbers, side="right")
        yield filled[block], begin[filled[block]] + numbers - (total - sizes)[block]
        position += len(numbers)


def _overlap(
    first: Split, a: ScannedSplit, second: Split, b: ScannedSplit, most_pairs: int
) -> Overlap:
    exact_B, partner_B = _same_content(a, b)
    has_looks = [scan.contrast_RI.ravel() >= FLAT_CONTRAST for scan in (a, b)]
    looks_A = np.where(has_looks[0], a.looks_RI.ravel(), 0)
    hashes, place_A = np.unique(looks_A[has_looks[0]], return_index=True)
    place_A = np.flatnonzero(has_looks[0])[place_A]
    searched_B = np.flatnonzero(has_looks[1] & ~exact_B)
    wanted, back = np.unique(b.looks_RI.ravel()[searched_B], return_inverse=True)
    nearest, distance, complete = nearest_hashes(hashes, wanted)
    distance_B = np.full(b.looks_RI.size, 65)
    distance_B[searched_B] = distance[back]
    found = searched_B[distance[back] <= NEAR_BITS]
    partner_B[found] = place_A[nearest[back][distance[back] <= NEAR_BITS]] if len(found) else 0
    distance_B[exact_B] = 0
    pairs = []
    for kind in (exact_B, ~exact_B & (distance_B <= NEAR_BITS)):
        chosen = np.flatnonzero(kind)
        for i in chosen[np.argsort(distance_B[chosen], kind="stable")][:most_pairs]:
            columns = a.content_RI.shape[1]
            one = Place(first, *map(int, divmod(partner_B[i], columns)))
            other = Place(second, *map(int, divmod(i, columns)))
            pairs.append((one, other, bool(exact_B[i]), int(distance_B[i])))
    return Overlap(first, second, int(exact_B.sum()), len(found), complete, tuple(pairs))


def _same_content(a: ScannedSplit, b: ScannedSplit) -> tuple[np.ndarray, np.ndarray]:
    """Return which images of b are in a, and the place of one such image there."""
    content_A, content_B = a.content_RI.ravel(), b.content_RI.ravel()
    order = np.argsort(content_A, kind="stable")
    at = np.searchsorted(content_A[order], content_B)
    inside = at < len(content_A)
    partner_B = order[np.where(inside, at, 0)] if len(order) else np.zeros(len(at), np.int64)
    exact_B = inside & (content_B != 0)
    exact_B[exact_B] = content_A[partner_B[exact_B]] == content_B[exact_B]
    return exact_B, partner_B
