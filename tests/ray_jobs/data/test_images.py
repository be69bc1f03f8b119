import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.data.images import (
    BadImage,
    decode,
    decode_stored,
    deep_values,
    encode_jpeg,
    prepare_image,
    stored_size,
    to_square,
)
from tests.ray_jobs.pixels import chunk, png_16, tiff

MAX_PIXELS = 10_000_000


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(width: int = 60, height: int = 40) -> Image.Image:
    """Return a smooth image, which JPEG hardly changes: red grows rightwards, green downwards."""
    x, y = np.meshgrid(np.linspace(20, 230, width), np.linspace(20, 230, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], axis=2).astype(np.uint8))


def difference(a: Image.Image | np.ndarray, b: Image.Image | np.ndarray) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())


def error_of(content: bytes, max_pixels: int = MAX_PIXELS) -> BadImage:
    with pytest.raises(BadImage) as caught:
        decode(content, max_pixels)
    return caught.value


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (encoded(photo(), "JPEG")[:-200], "truncated"),
        (b"this is no photo\n" * 20, "no image of a known format"),
        # An EPS file would be run as a program.
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
        (b"", "the file is empty"),
        (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "no known range"),
        (encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "no known range"),
    ],
)
def test_a_file_that_is_no_complete_image_of_a_known_range_is_unreadable(content, detail):
    error = error_of(content)
    assert error.reason == "unreadable_image"
    assert detail in error.detail


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_file_cut_anywhere_is_unreadable(kind):
    content, reasons = encoded(photo(), kind), set()
    for length in range(1, len(content), max(len(content) // 40, 1)):
        try:
            decode(content[:length], MAX_PIXELS)
        except BadImage as error:
            reasons.add(error.reason)
    assert reasons == {"unreadable_image"}


@pytest.mark.parametrize(
    ("content", "mode", "tolerance"),
    [
        (encoded(photo().convert("CMYK"), "JPEG", quality=95), "CMYK", 4),
        (encoded(photo(), "GIF"), "P", 12),
        (encoded(photo(), "JPEG2000"), "RGB", 2),
        # A phone appends a preview to its photo.
        (
            encoded(photo(), "MPO", save_all=True, append_images=[photo(30, 20)], quality=95),
            "RGB",
            4,
        ),
    ],
)
def test_other_formats_and_modes_keep_their_colours(content, mode, tolerance):
    assert Image.open(io.BytesIO(content)).mode == mode
    assert difference(decode(content, MAX_PIXELS), photo()) < tolerance


@pytest.mark.parametrize(("kind", "dtype"), [("TIFF", "u2"), ("TIFF", "i4"), ("PNG", "u2")])
def test_a_16_bit_image_is_scaled_and_not_clipped(kind, dtype):
    values = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(dtype)
    pixels = np.asarray(decode(encoded(Image.fromarray(values), kind), MAX_PIXELS))
    np.testing.assert_array_equal(pixels[..., 1], np.rint(values / 257))


GREYS = np.linspace(0, 4095, 60 * 40).reshape(40, 60).astype("u2")


def pixels_of(content: bytes, **options: object) -> np.ndarray:
    return np.asarray(decode(content, MAX_PIXELS, **options)).astype(int)


@pytest.mark.parametrize(
    ("content", "low", "high"),
    [
        # imageio issue 1049 and python-pillow issue 274: 12-bit cameras write 16-bit files.
        (png_16(GREYS), 0, 4095),
        (tiff(GREYS), 0, 4095),
        # python-pillow issues 3159 and 6786: nothing says what is white.
        (tiff(GREYS.astype("f4") / 4095), 0, 1),
        (tiff(GREYS.astype("f4") / 4095 * 255), 0, 255),
        (tiff(GREYS.astype("f4") - 1024), -1024, 3071),
        # python-pillow issue 452 and ImageMagick issue 8149: signed values.
        (tiff(GREYS.astype("i2") - 1024), -1024, 3071),
        (tiff(GREYS.astype("i4") * 1000), 0, 4_095_000),
        (tiff((GREYS.astype(int) // 16 - 128).astype("i1")), -128, 127),
        # xarray-spatial issue 2278 and ITK pull request 6636: WhiteIsZero.
        (tiff(4095 - GREYS, photometric=0), 0, 4095),
        (tiff(1 - GREYS.astype("f4") / 4095, photometric=0), 0, 1),
    ],
)
def test_values_over_8_bits_are_scaled_by_their_range(content, low, high):
    pixels = pixels_of(content, found_range=(low, high))
    np.testing.assert_array_equal(pixels, pixels_of(content, pixel_range=(low, high)))
    np.testing.assert_allclose(pixels[..., 0], GREYS / 4095 * 255, atol=1)
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_12_bits_a_sample_in_a_packed_tiff_are_read():
    row = np.array([[0, 4095], [2048, 16]], "u2")
    packed = bytes([0, 0x0F, 0xFF, 0x80, 0x00, 0x10])
    content = tiff(row).replace(row.astype("<u2").tobytes(), packed + bytes(2))
    content = content.replace(
        struct.pack("<HHII", 258, 3, 1, 16), struct.pack("<HHII", 258, 3, 1, 12)
    )
    np.testing.assert_array_equal(deep_values(content, MAX_PIXELS), row)


@pytest.mark.parametrize("name", ["RGB.png", "RGBA.png", "LA.png", "RGB.tif"])
def test_16_bit_colours_are_scaled_like_greys(name):
    """python-pillow issues 880 and 7723: Pillow drops the lower 8 bits."""
    alpha = np.where(np.arange(60) < 50, 65535, 0) + np.zeros_like(GREYS)
    channels = [GREYS] if name[0] == "L" else [GREYS, GREYS[::-1], GREYS[:, ::-1]]
    values = np.stack(channels + ([alpha] if "A" in name else []), axis=2).astype("u2")
    content = png_16(values) if "png" in name else tiff(values)
    measured = deep_values(content, MAX_PIXELS)
    assert measured.shape == (40, 60, 3)
    assert measured.max() == 4095
    pixels = pixels_of(content, found_range=(0, 4095))
    expected = np.stack((channels * 3)[:3], axis=2) / 4095 * 255
    if "A" in name:
        expected[:, 50:] = 255
    np.testing.assert_allclose(pixels, expected, atol=1)
    if "A" in name:
        # The range is that of the colours.
        swapped = pixels_of(content, pixel_range=(4095, 0))
        np.testing.assert_allclose(swapped[:, :50], 255 - expected[:, :50], atol=1)
        assert (swapped[:, 50:] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", ["u2", "u1"])
def test_a_16_bit_tiff_is_turned_like_one_of_8_bits(orientation, dtype):
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 3))
    content = tiff((colours * (257 if dtype == "u2" else 1)).astype(dtype), None, orientation)
    upright = decode(tiff(colours.astype("u1"), None, orientation), MAX_PIXELS)
    assert difference(decode(content, MAX_PIXELS), upright) == 0
    assert upright.size == ((6, 4) if orientation < 5 else (4, 6))


@pytest.mark.parametrize("colours", [GREYS, np.stack([GREYS] * 3, axis=2)])
def test_a_16_bit_png_is_turned_by_its_exif(colours):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = png_16(colours)
    turned = content[:33] + chunk(b"eXIf", exif.tobytes()[6:]) + content[33:]
    expected = np.rot90(pixels_of(content, found_range=(0, 4095)), -1)
    np.testing.assert_array_equal(pixels_of(turned, found_range=(0, 4095)), expected)


def test_values_outside_a_range_are_clipped_but_another_kind_of_image_is_refused():
    bright = GREYS.copy()
    bright[0, :20] = 60_000
    assert (pixels_of(png_16(bright), found_range=(0, 4095))[0, :20] == 255).all()
    assert (pixels_of(png_16(GREYS), found_range=(0, 2100)) == 255).any()
    with pytest.raises(BadImage, match=r"values, 0 to 4095, are far outside 0 to 255.*pixel_range"):
        decode(png_16(GREYS), MAX_PIXELS, found_range=(0, 255))
    # A range that the user set clips anything, as a window does, and can swap black and white.
    swapped = pixels_of(png_16(GREYS), pixel_range=(4095, 0))
    np.testing.assert_allclose(swapped, 255 - pixels_of(png_16(GREYS), found_range=(0, 4095)))
    assert (pixels_of(png_16(GREYS), pixel_range=(0, 255))[-1] == 255).all()
    holes = GREYS.astype("f4") / 4095
    holes[0], holes[1, :9] = np.nan, np.inf
    pixels = pixels_of(tiff(holes), found_range=(0, 1))
    assert (pixels[0] == 0).all()
    assert (pixels[1, :9] == 255).all()


@pytest.mark.parametrize("dtype", ["f8", "f2"])
def test_a_tiff_of_another_type_has_a_reason(dtype):
    """imageio issue 707: a TIFF of float64 or colours of float32."""
    assert "a TIFF with unsupported values" in error_of(tiff(GREYS.astype(dtype))).detail


def test_images_of_8_bits_are_the_same_with_any_range():
    palette = photo().convert("P", palette=Image.Palette.ADAPTIVE)
    for image in (*map(photo().convert, ("1", "L", "LA", "RGBA", "CMYK")), palette):
        kind = "TIFF" if image.mode == "CMYK" else "PNG"
        content = encoded(image, kind)
        assert deep_values(content, MAX_PIXELS) is None
        plain = decode(content, MAX_PIXELS)
        for options in ({"pixel_range": (0, 4095)}, {"found_range": (5, 9)}):
            assert difference(decode(content, MAX_PIXELS, **options), plain) == 0
    # Pillow inverts greys of 8 bits itself.
    assert difference(pixels_of(tiff(np.full((2, 2), 55, "u1"), 0)), np.full((2, 2, 3), 200)) == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_images_become_rgb(mode):
    grey = photo().convert("L").convert(mode)
    decoded = decode(encoded(grey, "PNG"), MAX_PIXELS)
    assert decoded.mode == "RGB"
    assert difference(decoded, grey.convert("RGB")) == 0


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animated_image_is_rejected(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    error = error_of(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert error.reason == "animated_image"
    assert "3 frames" in error.detail


def test_transparent_parts_and_palette_colours_become_white():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 4, 8))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 0, 0, 200])
    palette.paste(1, (0, 0, 4, 8))
    for content in (
        encoded(image, "PNG"),
        encoded(image, "WEBP", lossless=True),
        encoded(palette, "PNG", transparency=0),
    ):
        decoded = decode(content, MAX_PIXELS)
        assert decoded.mode == "RGB"
        assert decoded.getpixel((7, 0)) == (255, 255, 255)
        assert decoded.getpixel((0, 0)) == (0, 0, 200)


def test_the_spec_and_not_pillow_limits_the_size_before_an_image_is_decoded():
    error = error_of(encoded(Image.new("1", (20_000, 20_000)), "PNG"), max_pixels=100_000_000)
    assert error.reason == "too_large_image"
    assert "20000 × 20000" in error.detail
    assert "max_image_pixels=100000000" in error.detail
    assert decode(encoded(Image.new("1", (12_000, 8_000)), "PNG"), 100_000_000).width == 12_000


def test_a_large_jpeg_decoded_at_a_reduced_size_looks_the_same():
    content = encoded(photo(1600, 1200), "JPEG", quality=95)
    reduced = decode(content, MAX_PIXELS, at_least=128)
    assert reduced.size == (200, 150)
    whole = to_square(decode(content, MAX_PIXELS), 64, "stretch")
    assert difference(to_square(reduced, 64, "stretch"), whole) < 1


def test_an_image_is_stretched_cropped_to_the_centre_or_padded_with_black():
    stretched = to_square(photo(), 20, "stretch")
    assert stretched.size == (20, 20)
    assert difference(stretched, photo(20, 20)) < 5
    cropped = to_square(photo(60, 40), 40, "crop")
    assert difference(cropped, photo(60, 40).crop((10, 0, 50, 40))) == 0
    padded = np.asarray(to_square(photo(60, 40), 30, "pad"))
    assert padded.shape == (30, 30, 3)
    assert not padded[:5].any()
    assert not padded[-5:].any()
    assert padded[5:25].all()


def test_a_square_is_stored_as_a_jpeg_or_as_raw_pixels_without_metadata():
    plain, noted = encoded(photo(), "JPEG"), encoded(photo(), "JPEG", comment=b"of the patient")
    assert plain != noted
    square = to_square(decode(plain, MAX_PIXELS), 32, "crop")
    spec = PrepareSpec(image_size=32, aspect="crop", jpeg_quality=90)
    stored = encode_jpeg(square, 90)
    assert prepare_image(plain, spec) == prepare_image(noted, spec) == (stored, 60 * 40)
    pixels = decode_stored(stored)
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    assert difference(pixels, square) < 2
    raw = PrepareSpec(image_size=32, aspect="crop", store="raw")
    assert prepare_image(plain, raw).content == square.tobytes()
    large = encoded(photo(1600, 1200), "JPEG")
    assert prepare_image(large, raw).original_pixels == 1600 * 1200


def test_a_huge_size_in_a_stored_header_is_rejected_before_memory_is_allocated():
    content = encode_jpeg(Image.new("RGB", (16, 16)), 90)
    # OpenCV would allocate 12 GB for 64,000 × 64,000 pixels.
    huge = with_size(content, content.index(b"\xff\xc0") + 5, ">HH", 64_000, 64_000)
    message = r"its shape is \(64000, 64000, 3\), but the manifest says"
    with pytest.raises(ValueError, match=message):
        decode_stored(huge, (16, 16, 3))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif" + bytes(500)}])
def test_the_size_in_a_stored_header_is_that_of_the_pixels(options):
    content = encoded(Image.new("RGB", (24, 16)), "JPEG", **options)
    assert stored_size(content) == decode_stored(content).shape[:2] == (16, 24)
    for cut in range(content.index(b"\xff\xda")):
        with pytest.raises(ValueError, match="bytes are not a JPEG"):
            decode_stored(content[:cut])


def with_size(content: bytes, place: int, kind: str, width: int, height: int) -> bytes:
    """Return a file with another size written into its header."""
    sides = struct.pack(kind, width, height)
    return content[:place] + sides + content[place + len(sides) :]


def test_a_gif_whose_frame_is_larger_than_its_screen_is_too_large():
    content = with_size(encoded(Image.new("P", (2000, 2000)), "GIF"), 6, "<HH", 8, 8)
    error = error_of(content, max_pixels=1_000_000)
    assert error.reason == "too_large_image"
    assert "2000 × 2000" in error.detail


def test_a_jpeg_2000_file_with_two_sizes_is_rejected():
    content = encoded(Image.new("L", (2000, 2000)), "JPEG2000")
    small = with_size(content, content.index(b"ihdr") + 4, ">II", 8, 8)
    assert Image.open(io.BytesIO(small)).size == (8, 8)
    assert "header says 8 × 8 pixels and its data 2000 × 2000" in error_of(small).detail
    assert decode(content, MAX_PIXELS).size == (2000, 2000)
    bare = content[content.index(b"\xff\x4f\xff\x51") :]
    assert error_of(bare, max_pixels=1_000_000).reason == "too_large_image"


def test_a_jpeg_with_a_second_larger_header_is_too_large():
    small, large = encoded(photo(), "JPEG"), encoded(photo(2000, 2000), "JPEG")
    frames = []
    for content in (small, large):
        start = content.index(b"\xff\xc0")
        frames.append((start, start + 2 + int.from_bytes(content[start + 2 : start + 4], "big")))
    (_, end), (start, stop) = frames
    content = small[:end] + large[start:stop] + small[end:]
    assert error_of(content, max_pixels=1_000_000).reason == "too_large_image"


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_a_png_with_megabytes_of_compressed_metadata_is_rejected(name):
    packed = zlib.compress(bytes(50_000_000), 9)
    content = encoded(photo(), "PNG")
    content = content[:33] + chunk(name, b"name\0\0" + packed) + content[33:]
    assert "too large" in error_of(content).detail


def test_pixels_after_the_last_row_of_a_png_are_not_decompressed():
    pixels = zlib.compress(bytes(9 * 8) + bytes(50_000_000), 9)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    assert decode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks), MAX_PIXELS).size == (8, 8)


def with_orientation(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif, quality=95)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_rotation_results_in_the_upright_photo(orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = photo()
    if orientation in undo:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    decoded = decode(with_orientation(stored, orientation), MAX_PIXELS)
    assert difference(decoded, photo()) < 4
    assert decoded.info == {"original_pixels": decoded.width * decoded.height}
    assert not decoded.getexif()


def test_damaged_metadata_causes_no_warning_in_any_thread():
    content = with_orientation(photo(), 1)
    place = content.index(b"Exif\0\0") + 6 + 8
    content = content[:place] + b"\x09\x00" + content[place + 2 :]
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(io.BytesIO(content)).getexif()
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: decode(content, MAX_PIXELS).size, range(80)))
    assert found == [(60, 40)] * 80
    assert list(warnings.filters) == before
