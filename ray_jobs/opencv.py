"""OpenCV, told to refuse an image that says it is huge before taking memory for it.

It reads the limit when it is loaded, so it is imported from here.
"""

import os

MAX_PIXELS = 100_000_000
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))

import cv2  # noqa: E402

__all__ = ["MAX_PIXELS", "cv2"]
