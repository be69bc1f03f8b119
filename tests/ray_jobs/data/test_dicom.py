import sys

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

import ray_jobs.data
from ray_jobs.data.images import BadImage, decode, deep_values
from tests.ray_jobs.pixels import dicom

GREYS = np.arange(0, 4096, 64).reshape(8, 8).astype(np.uint16)
SIGNED = (GREYS.astype(np.int16) - 1024) // 4


def greys(content: bytes, **options: object) -> np.ndarray:
    pixels = np.asarray(decode(content, 10_000, **options))
    np.testing.assert_array_equal(pixels, pixels[..., :1].repeat(3, axis=2))
    return pixels[..., 0].astype(int)


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint((values.clip(low, high) - low) / (high - low) * 255)


def test_greys_without_a_window_use_their_own_range_and_8_bits_keep_theirs():
    # pydicom issue 2122: a file without a window becomes a black PNG.
    np.testing.assert_array_equal(greys(dicom(GREYS)), scaled(GREYS, 0, GREYS.max()))
    dark = (GREYS // 64).astype(np.uint8)
    np.testing.assert_array_equal(greys(dicom(dark, bits=8)), dark)
    rescaled = dicom(dark, bits=8, RescaleSlope=1, RescaleIntercept=0)
    np.testing.assert_array_equal(greys(rescaled), dark)


@pytest.mark.parametrize(
    ("elements", "low", "high"),
    [
        # PS3.3 C.11.2.1.2.1: from centre - 0.5 - (width - 1) / 2 to centre - 0.5 + (width - 1) / 2.
        ({"WindowCenter": 40, "WindowWidth": 401}, -160.5, 239.5),
        # pydicom issue 1401: slope and intercept come first.
        (
            {"WindowCenter": 40, "WindowWidth": 401, "RescaleSlope": 2, "RescaleIntercept": -50},
            -55.25,
            144.75,
        ),
        # The first of several windows.
        ({"WindowCenter": [40, 400], "WindowWidth": [401, 1500]}, -160.5, 239.5),
        ({"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "LINEAR_EXACT"}, -160, 240),
        # pydicom issue 1125: files of MRI have no slope, and some no window.
        ({}, SIGNED.min(), SIGNED.max()),
        ({"WindowCenter": None, "WindowWidth": None}, SIGNED.min(), SIGNED.max()),
        # pydicom issues 818 and 1615: -2000 outside the circle of a CT scan.
        ({"PixelPaddingValue": int(SIGNED.min())}, SIGNED.min() + 16, SIGNED.max()),
    ],
)
def test_the_first_window_is_applied_after_slope_and_intercept(elements, low, high):
    content = dicom(SIGNED, **elements)
    np.testing.assert_allclose(greys(content), scaled(SIGNED, low, high), atol=1)
    assert deep_values(content, 10_000) is None


def test_a_lookup_table_is_applied_where_there_is_no_window():
    table = Dataset()
    table.LUTDescriptor = [4096, 0, 10]
    table.LUTData = (np.arange(4096) // 8).astype("<u2").tobytes()
    content = dicom(GREYS, VOILUTSequence=Sequence([table]))
    np.testing.assert_array_equal(greys(content), np.rint(GREYS // 8 / 1023 * 255))


def test_a_set_range_replaces_the_window_and_a_found_one_does_not():
    # Project-MONAI/monai-deploy-app-sdk pull request 290: minimum is white in MONOCHROME1.
    content = dicom(
        GREYS, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=0, WindowWidth=100,
        PhotometricInterpretation="MONOCHROME1",
    )  # fmt: skip
    hounsfield = GREYS.astype(int) - 1024
    expected = scaled(hounsfield, -1000, 400)
    np.testing.assert_array_equal(greys(content, pixel_range=(-1000, 400)), 255 - expected)
    windowed = 255 - scaled(hounsfield, -50, 49)
    np.testing.assert_array_equal(greys(content, found_range=(0, 255)), windowed)


def test_colours_stay_and_a_palette_is_applied():
    colours = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)
    decoded = decode(dicom(colours, bits=8), 10_000)
    np.testing.assert_array_equal(np.asarray(decoded), colours)
    # pydicom issue 1405: an ultrasound image is an index into three tables.
    names = ["Red", "Green", "Blue"]
    tables = {
        f"{name}PaletteColorLookupTableData": bytes(np.arange(256, dtype="u1")[:: 1 - 2 * (i == 1)])
        for i, name in enumerate(names)
    }
    descriptors = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 8] for name in names}
    elements = {"PhotometricInterpretation": "PALETTE COLOR", **descriptors, **tables}
    pixels = np.asarray(decode(dicom(colours[..., 0], bits=8, **elements), 10_000)).astype(int)
    np.testing.assert_array_equal(pixels[..., 0], colours[..., 0])
    np.testing.assert_array_equal(pixels[..., 1], 255 - colours[..., 0].astype(int))


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (dicom(np.stack([GREYS] * 3), NumberOfFrames=3), "animated_image", "3 frames"),
        (dicom(np.zeros((101, 100), np.uint16)), "too_large_image", "100 × 101 pixels"),
        (dicom(GREYS, Rows=0), "unreadable_image", "contains no image"),
        (dicom(GREYS)[:-50], "unreadable_image", "pixel data"),
    ],
)
def test_a_file_that_is_no_single_image_is_refused(content, reason, detail):
    with pytest.raises(BadImage) as caught:
        decode(content, 10_000)
    assert caught.value.reason == reason
    assert detail in caught.value.detail


def test_without_pydicom_the_reason_names_the_extra(monkeypatch):
    content = dicom(GREYS)
    monkeypatch.delitem(sys.modules, "ray_jobs.data.dicom", raising=False)
    monkeypatch.delattr(ray_jobs.data, "dicom", raising=False)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(BadImage, match=r"pip install 'multimodal-ray\[dicom\]'"):
        decode(content, 10_000)
