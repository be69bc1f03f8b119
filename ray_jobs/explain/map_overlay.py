"""Draws maps over images."""

from typing import Any

import cv2
import numpy as np


def overlay_map(pixels_RGB: np.ndarray, map_HW: np.ndarray) -> bytes:
    """Return a JPEG of a grey image under a map, whose highest value is opaque.

    Args:
        pixels_RGB: uint8 (H, W, 3).
        map_HW: Map of any size, at least 0.
    """
    image: Any = pixels_RGB[..., ::-1]
    size = (image.shape[1], image.shape[0])
    large = cv2.resize(map_HW / max(float(map_HW.max()), 1e-9), size, interpolation=cv2.INTER_CUBIC)
    alpha = 0.75 * np.clip(large, 0, 1)[:, :, None]
    heat = cv2.applyColorMap((255 * np.clip(large, 0, 1)).astype(np.uint8), cv2.COLORMAP_INFERNO)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    return cv2.imencode(".jpg", (alpha * heat + (1 - alpha) * grey).astype(np.uint8))[1].tobytes()
