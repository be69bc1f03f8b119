from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs.config.errors import JobError
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.data.images import EIGHT_BITS, BadImage
from ray_jobs.data.manifest import Manifest
from ray_jobs.prepare.pixel_range import find_pixel_range
from ray_jobs.prepare.row_validation import CheckedRows
from ray_jobs.prepare.sources.source import ImageRefs
from tests.ray_jobs.pixels import dicom, png_16, tiff
from tests.ray_jobs.raw import Raw, files, jpeg, quarantine, rows_by_key

GREYS = np.linspace(0, 4095, 24 * 24).reshape(24, 24).astype("u2")


@dataclass
class Reader:
    contents: Sequence[bytes | BadImage]

    def read(self, refs):
        return (self.contents[int(name)] for name in refs.path.to_pylist())


def found(*contents: bytes | BadImage, **options: object) -> tuple[tuple[float, float], str]:
    keys = pa.array([str(i) for i in range(len(contents))], pa.large_string())
    rows = CheckedRows(
        keys=keys,
        images=(ImageRefs(keys),),
        numeric_RF=np.empty((len(keys), 0), np.float32),
        categories={},
        labels=np.zeros(len(keys), np.int8),
        groups=keys,
        splits=np.zeros(len(keys), np.int8),
    )
    return find_pixel_range(rows, [Reader(contents)], PrepareSpec(**options), None)


def of(*values: float, dtype: str = "u2") -> np.ndarray:
    return np.array([values], dtype)


@pytest.mark.parametrize(
    ("contents", "expected", "text"),
    [
        ([jpeg(1), png_16(of(7, 255))], (0, 255), "8 bits in use (0 to 255)"),
        ([png_16(of(300, 1023))], (0, 1023), "10 bits"),
        # imageio issue 1049: at most 419 of 4,095 in this image, but not in all.
        ([png_16(of(0, 419)), png_16(of(0, 4000))], (0, 4095), "12 bits in use (0 to 4,095)"),
        ([tiff(of(9, 4096))], (0, 16383), "14 bits"),
        # pytorch issue 20524: the whole range.
        ([jpeg(1), png_16(of(0, 40_000))], (0, 65535), "16 bits"),
        ([tiff(of(0, 4_095_000, dtype="i4"))], (0, 4_095_000), "in use (0 to 4,095,000)"),
        # ImageMagick issue 8149: signed TIFFs.
        (
            [tiff(of(-1024, 100, dtype="i2")), tiff(of(0, 3071, dtype="i2"))],
            (-1024, 3071),
            "-1,024",
        ),
        # python-pillow issues 3159 and 6786, and minerva-author issue 28: floats.
        ([tiff(of(0, 0.2, dtype="f4")), tiff(of(0.1, 0.93, dtype="f4"))], (0, 1), "(0 to 1)"),
        ([tiff(of(3, 250, dtype="f4"))], (0, 255), "(0 to 255)"),
        ([tiff(of(0, 0.25, dtype="f4"))], (0, 0.25), "(0 to 0.25)"),
        ([tiff(of(0.5, 2.5, dtype="f4"))], (0.5, 2.5), "(0.5 to 2.5)"),
        ([tiff(of(-2, np.nan, np.inf, 6, dtype="f4"))], (-2, 6), "(-2 to 6)"),
        ([tiff(of(7.5, 7.5, dtype="f4"))], (7.5, 8.5), "(7.5 to 8.5)"),
        # python-pillow issue 7723: colours.
        ([png_16(np.full((2, 2, 3), 900))], (0, 1023), "10 bits"),
        # Alpha is not brightness.
        ([png_16(np.array([[[900, 65535], [1, 65535]]]))], (0, 1023), "10 bits"),
    ],
)
def test_the_range_is_the_smallest_usual_one_that_covers_the_sample(contents, expected, text):
    pixel_range, note = found(*contents)
    assert pixel_range == pytest.approx(expected)
    assert text in note
    assert "--prepare.pixel_range sets" in note


def test_images_of_8_bits_and_dicom_files_need_no_range():
    bad = BadImage("missing_image", "no such file")
    assert found(jpeg(1), bad, jpeg(2, "PNG"), b"no photo", dicom(GREYS)) == (EIGHT_BITS, "")


def test_a_set_range_needs_no_sample_and_is_said():
    assert found(b"", pixel_range=(-1000, 400)) == (
        (-1000, 400),
        "images: over 8 bits, -1,000 is black and 400 is white",
    )
    with pytest.raises(ValueError, match="two different finite values"):
        PrepareSpec(pixel_range=(5, 5))


def test_floats_and_integers_of_different_ranges_are_refused():
    with pytest.raises(JobError, match=r"1 has 0 to 0.5, and 0 has 0 to 4000; store all images"):
        found(png_16(of(0, 4000)), tiff(of(0, 0.5, dtype="f4")))
    assert found(png_16(of(0, 3)), tiff(of(0, 4000.5, dtype="f4")))[0] == (0, 4000.5)


def stored(raw: Raw, manifest: Manifest) -> dict[str, np.ndarray]:
    rows = rows_by_key(raw.out(), manifest)
    return {
        key: np.frombuffer(row["image"], np.uint8).reshape(24, 24, 3)[..., 0].astype(int)
        for key, row in rows.items()
    }


@pytest.fixture
def scans(raw) -> Raw:
    """Rows with 12-bit images."""
    for i, row in enumerate(raw.rows):
        raw.image(row["key"], png_16(np.maximum(GREYS, i)))
    return raw


@pytest.mark.usefixtures("ray_local")
def test_prepare_scales_12_bits_stores_the_range_and_prints_it(scans, capsys):
    manifest = scans.prepare(store="raw")
    assert manifest.image.pixel_range == (0, 4095)
    assert manifest.prepare.pixel_range is None
    assert "\nimages: 12 bits in use (0 to 4,095), scaled to 8 bits; " in capsys.readouterr().out
    for pixels in stored(scans, manifest).values():
        np.testing.assert_allclose(pixels, GREYS / 4095 * 255, atol=4)
    before = files(scans.out())
    assert scans.prepare(store="raw") == manifest
    assert files(scans.out()) == before

    # The range of an earlier version, on request.
    full = scans.prepare(store="raw", pixel_range=(0, 65535))
    assert max(pixels.max() for pixels in stored(scans, full).values()) == 16
    assert not before.keys() & files(scans.out()).keys() - {"quarantine/part-00000.parquet"}


@pytest.mark.usefixtures("ray_local")
def test_an_image_of_another_kind_is_in_quarantine_with_a_flag_that_works(raw):
    # With 130 rows, the sample of 64 misses the second row.
    raw.add(range(48, 130))
    raw.image("k1", png_16(GREYS))
    manifest = raw.prepare(store="raw")
    assert manifest.image.pixel_range == EIGHT_BITS
    reason, detail = quarantine(raw.out())["k1"]
    assert reason == "unreadable_image"
    assert "k1.jpg: its values, 0 to 4095, are far outside 0 to 255" in detail
    assert "set prepare.pixel_range" in detail
    manifest = raw.prepare(store="raw", pixel_range=(0, 4095))
    assert quarantine(raw.out()) == {}
    np.testing.assert_allclose(stored(raw, manifest)["k1"], GREYS / 4095 * 255, atol=1)


@pytest.mark.usefixtures("ray_local")
def test_a_found_range_is_kept_while_the_sample_fits_so_that_shards_are_kept(raw):
    for row in raw.rows:
        raw.image(row["key"], tiff((GREYS.astype("f4") - 1000).clip(-900, 3000)))
    raw.image("k0", tiff(GREYS.astype("f4") - 1000))
    first = raw.prepare()
    assert first.image.pixel_range == (-1000, 3095)
    before = files(raw.out())
    # Without this row, minimum and maximum of the sample are others.
    del raw.rows[0]
    second = raw.prepare()
    assert second.image.pixel_range == (-1000, 3095)
    assert len(before.keys() - files(raw.out()).keys()) == 1
    assert raw.prepare("new").image.pixel_range == (-900, 3000)
    # A set range is not kept once the setting is gone.
    raw.prepare(pixel_range=(-2000, 4000))
    assert raw.prepare().image.pixel_range == (-900, 3000)
