import numpy as np
import pyarrow as pa

from ray_jobs.prepare.sources.byte_range_reader import ByteRangeReader
from ray_jobs.prepare.sources.source import ImageRefs
from ray_jobs.storage.folder import Folder


def test_whole_files_and_parts_of_files_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    paths = pa.array(["a", None, "a", "none", "a", "a"])
    ranges = ImageRefs(paths, np.array([0, 0, 2, 0, 5, 8]), np.array([2, 0, 3, 1, 5, 9]))
    read = list(ByteRangeReader(Folder(tmp_path)).read(ranges))
    assert [r if isinstance(r, bytes) else r.reason for r in read] == [
        b"01", "missing_image", b"234", "missing_image", b"56789", "unreadable_file"
    ]  # fmt: skip
    whole = list(ByteRangeReader(Folder(tmp_path)).read(ImageRefs(paths.take([0, 1, 0]))))
    assert whole[0] == whole[2] == b"0123456789"
    assert whole[1].reason == "missing_image"
