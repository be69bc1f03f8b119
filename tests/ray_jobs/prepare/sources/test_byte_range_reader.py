import numpy as np
import pyarrow as pa

from ray_jobs.prepare.sources.byte_range_reader import ByteRangeReader
from ray_jobs.prepare.sources.source import ImageRefs
from ray_jobs.storage.folder import Folder


def test_whole_files_and_parts_of_files_are_read_in_order_and_failures_keep_their_position(
    tmp_path,
):
    for i in range(30):
        (tmp_path / f"{i}").write_bytes(b"0123456789%d" % i)
    (tmp_path / "folder").mkdir()
    paths = pa.array(["0", None, "0", "none", "0", "0", "folder", "a\x00b"])
    start, size = [0, 0, 2, 0, 5, 8, 0, 0], [2, 0, 3, 1, 5, 9, 1, 1]
    ranges = ImageRefs(paths, np.array(start), np.array(size))
    whole = ImageRefs(pa.array([*map(str, range(30)), *paths.to_pylist()]))
    parts, files = (
        [r if isinstance(r, bytes) else r.reason for r in ByteRangeReader(Folder(tmp_path)).read(i)]
        for i in (ranges, whole)
    )
    first, missing, unreadable = b"01234567890", "missing_image", "unreadable_file"
    failed = [unreadable, unreadable]
    assert parts == [b"01", missing, b"234", missing, b"56789", unreadable, *failed]
    assert files[:30] == [b"0123456789%d" % i for i in range(30)]
    assert files[30:] == [first, missing, first, missing, first, first, *failed]
