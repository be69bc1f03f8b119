from typing import Any

import cv2
import numpy as np
import pytest
from scipy import fft

from ray_jobs.data.manifest import ImageInfo
from ray_jobs.inspect.shard_scan import perceptual_hashes
from tests.ray_jobs.inspect.samples import SPLITS, look, photo, rows, write


def test_the_perceptual_hash_is_that_of_scipys_cosine_transform():
    small = np.random.default_rng(0).integers(0, 256, (20, 32, 32)).astype(np.uint8)
    for found, pixels in zip(perceptual_hashes(small), small, strict=True):
        low = fft.dctn(pixels.astype(np.float64), norm="ortho")[:8, :8].ravel()
        bits = "".join("1" if value > np.median(low) else "0" for value in low)
        assert int(found) == int(bits, 2)


def test_raw_pixels_and_several_images_a_row_are_looked_at_column_by_column(tmp_path):
    info = ImageInfo(encoding="raw", height=12, width=20, names=("front", "back"))

    def pair(split: str) -> dict[str, Any]:
        found = rows(split, 15)
        del found["image"]
        start = SPLITS.index(split) * 1000
        pixels = [cv2.resize(photo(start + i), (20, 12)) for i in range(30)]
        found["image_front"] = [image.tobytes() for image in pixels[:15]]
        found["image_back"] = [image.tobytes() for image in pixels[15:]]
        found["image_back"][2] = None
        return found

    data = {split: pair(split) for split in SPLITS}
    data["test"]["image_back"][5] = data["train"]["image_front"][6]
    report = look(write(tmp_path, data, image=info))
    front, back = report.images
    assert (front.column, back.column) == ("image_front", "image_back")
    assert (front.splits["train"].missing, back.splits["train"].missing) == (0, 1)
    grey = [
        np.frombuffer(content, np.uint8).reshape(-1, 3) @ np.array([0.299, 0.587, 0.114])
        for content in data["train"]["image_front"]
    ]
    assert front.brightness.splits["train"].mean == pytest.approx(
        np.mean([image.mean() for image in grey]), abs=0.05
    )
    assert front.contrast.splits["train"].mean == pytest.approx(
        np.mean([image.std() for image in grey]), abs=0.05
    )
    (same,) = [pair for o in report.duplicates.overlaps for pair in o.examples if pair.exact]
    assert (same.first.column, same.second.column) == ("image_front", "image_back")
    assert (same.first.row, same.second.row) == (6, 5)
