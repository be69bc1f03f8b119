"""Finds duplicate images and keys, within and across splits, by their hashes.

Images whose perceptual hashes differ in few bits look alike. If two 64-bit hashes differ in at most
five bits, at least one of three substrings differs in at most one bit (Norouzi, Punjani and Fleet,
"Fast Search in Hamming Space with Multi-Index Hashing", 2012). Therefore only hashes with such a
substring are compared.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from ray_jobs.config.prepare_spec import SPLITS, Split
from ray_jobs.inspect.report_schema import Duplicates, ImagePair, Overlap, SharedKey, SharedKeys
from ray_jobs.inspect.shard_scan import ScannedSplit, Scans

NEAR_BITS = 5
"""Maximum number of differing bits between the hashes of near-duplicates."""
FLAT_CONTRAST = 4.0
"""Images with less contrast are excluded from the search for near-duplicates."""

_SUBSTRINGS = ((0, 22), (22, 21), (43, 21))
"""First bit and number of bits of each substring of a hash."""
_COMPARE_AT_ONCE = 1 << 22
_MAX_COMPARISONS = 1 << 31
_MAX_PAIRS = 50
_MAX_KEYS = 5


def find_duplicates(scans: Scans) -> Duplicates:
    """Return the duplicate images within each split and between each two splits."""
    return Duplicates(
        within={split: _count_repeated(scan) for split, scan in scans.items()},
        conflicting=_count_conflicting(scans),
        overlaps=tuple(
            _overlap(first, second, scans)
            for second in SPLITS[1:]
            for first in SPLITS[: SPLITS.index(second)]
        ),
    )


def find_shared_keys(scans: Scans) -> SharedKeys:
    """Return the keys that occur in more than one split."""
    distinct = [np.unique(scan.key_hash_R) for scan in scans.values()]
    hashes, counts = np.unique(np.concatenate(distinct), return_counts=True)
    splits: dict[str, list[Split]] = defaultdict(list)
    for split, scan in scans.items():
        for key in scan.keys_R[np.isin(scan.key_hash_R, hashes[counts > 1])]:
            splits[key].append(split)
    examples = list(splits.items())[:_MAX_KEYS]
    return SharedKeys(
        num_shared=len(splits),
        examples=tuple(SharedKey(key=key, splits=tuple(found)) for key, found in examples),
    )


def nearest_hashes(
    first: np.ndarray, second: np.ndarray, max_comparisons: int = _MAX_COMPARISONS
) -> tuple[np.ndarray, np.ndarray, bool]:
    """For each hash of the second array, find the nearest of the first within `NEAR_BITS`.

    Args:
        first: Distinct hashes, uint64.
        second: Distinct hashes, uint64.
        max_comparisons: The search stops after this number of comparisons.

    Returns:
        The index of the nearest hash in `first`, its distance in bits (65 if none is near), and
        whether the search is complete.
    """
    # Distance and index in one number, whose minimum is the nearest hash.
    best = np.full(len(second), 65 << 48, np.int64)
    complete = True
    for at, index in _candidates(first, second):
        max_comparisons -= len(at)
        if max_comparisons < 0:
            complete = False
            break
        distance = np.bitwise_count(first[index] ^ second[at]).astype(np.int64)
        near = distance <= NEAR_BITS
        np.minimum.at(best, at[near], (distance[near] << 48) | index[near])
    return best & ((1 << 48) - 1), best >> 48, complete


def _candidates(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, in chunks, indices in `second` and `first` of hashes with a nearly equal substring."""
    for start, num_bits in _SUBSTRINGS:
        mask = np.uint64((1 << num_bits) - 1)
        substrings = (first >> np.uint64(start)) & mask
        order = np.argsort(substrings, kind="stable")
        substrings = substrings[order]
        wanted = (second >> np.uint64(start)) & mask
        for flip in (0, *(1 << bit for bit in range(num_bits))):
            begin = np.searchsorted(substrings, wanted ^ np.uint64(flip), side="left")
            end = np.searchsorted(substrings, wanted ^ np.uint64(flip), side="right")
            filled = np.flatnonzero(end > begin)
            sizes = (end - begin)[filled]
            total = np.cumsum(sizes)
            num_pairs = int(sizes.sum())
            for position in range(0, num_pairs, _COMPARE_AT_ONCE):
                pairs = np.arange(position, min(position + _COMPARE_AT_ONCE, num_pairs))
                block = np.searchsorted(total, pairs, side="right")
                at = filled[block]
                yield at, order[begin[at] + pairs - (total - sizes)[block]]


def _count_repeated(scan: ScannedSplit) -> int:
    """Return the number of images with the same bytes as an earlier image of the split."""
    content = scan.content_RI[scan.content_RI != 0]
    return len(content) - len(np.unique(content))


def _count_conflicting(scans: Scans) -> int:
    """Return the number of images whose bytes occur in rows of both classes."""
    content = np.concatenate([scan.content_RI.ravel() for scan in scans.values()])
    label = np.concatenate(
        [np.repeat(scan.label_R, scan.content_RI.shape[1]) for scan in scans.values()]
    )
    both = np.intersect1d(content[label == 0], content[label == 1])
    return int(np.isin(content, both[both != 0]).sum())


def _overlap(first: Split, second: Split, scans: Scans) -> Overlap:
    """Return the images of the second split that also occur in the first.

    A images of the first split   B images of the second split
    """
    a, b = scans[first], scans[second]
    content, index = np.unique(a.content_RI, return_index=True)
    content_B = b.content_RI.ravel()
    exact_B = (content_B != 0) & np.isin(content_B, content)
    match_B = np.zeros(len(content_B), np.int64)
    match_B[exact_B] = index[np.searchsorted(content, content_B[exact_B])]
    textured_A, textured_B = (scan.contrast_RI.ravel() >= FLAT_CONTRAST for scan in (a, b))
    hashes, index = np.unique(a.perceptual_RI.ravel()[textured_A], return_index=True)
    index = np.flatnonzero(textured_A)[index]
    searched = np.flatnonzero(textured_B & ~exact_B)
    wanted, inverse = np.unique(b.perceptual_RI.ravel()[searched], return_inverse=True)
    nearest, distance, complete = nearest_hashes(hashes, wanted)
    nearest, distance = nearest[inverse], distance[inverse]
    near = distance <= NEAR_BITS
    match_B[searched[near]] = index[nearest[near]]
    near_found, near_distance = searched[near], distance[near]
    nearest_first = np.argsort(near_distance, kind="stable")[:_MAX_PAIRS]
    exact_found = np.flatnonzero(exact_B)
    shown = [(i, 0) for i in exact_found[:_MAX_PAIRS]]
    shown += zip(near_found[nearest_first], near_distance[nearest_first], strict=True)
    num_columns = b.content_RI.shape[1]
    return Overlap(
        first=first,
        second=second,
        exact=len(exact_found),
        near=len(near_found),
        complete=complete,
        examples=tuple(
            ImagePair(
                first=a.image(*divmod(int(match_B[i]), num_columns)),
                second=b.image(*divmod(int(i), num_columns)),
                exact=bool(exact_B[i]),
                distance=int(bits),
            )
            for i, bits in shown
        ),
    )
