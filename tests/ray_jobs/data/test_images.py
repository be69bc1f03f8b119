import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from ray_jobs.config.spec import PrepareSpec
from ray_jobs.data.images import (
    BadImage,
    decode,
    decode_stored,
    encode_jpeg,
    prepare_image,
    stored_size,
    to_square,
)

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


def test_a_truncated_jpeg_is_unreadable():
    content = encoded(photo(200, 200), "JPEG")
    error = error_of(content[: len(content) // 2])
    assert error.reason == "unreadable_image"
    assert "truncated" in error.detail


def test_a_text_file_and_an_empty_file_are_unreadable():
    assert "no image of a known format" in error_of(b"this is no photo\n" * 20).detail
    assert error_of(b"").detail == "the file is empty"


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_file_cut_anywhere_is_unreadable(kind):
    content, reasons = encoded(photo(), kind), set()
    for length in range(1, len(content), max(len(content) // 40, 1)):
        try:
            decode(content[:length], MAX_PIXELS)
        except BadImage as error:
            reasons.add(error.reason)
    assert reasons == {"unreadable_image"}


def test_a_cmyk_jpeg_keeps_its_colours():
    content = encoded(photo().convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(content)).mode == "CMYK"
    assert difference(decode(content, MAX_PIXELS), photo()) < 4


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_16_bit_tiff_is_scaled_and_not_clipped(dtype):
    values = np.linspace(0, 65535, 60 * 40).reshape(40, 60)
    content = encoded(Image.fromarray(values.astype(dtype)), "TIFF")
    assert Image.open(io.BytesIO(content)).mode in ("I;16", "I")
    pixels = np.asarray(decode(content, MAX_PIXELS))
    np.testing.assert_array_equal(pixels[..., 0], np.rint(values.astype(dtype) / 257))


def test_a_16_bit_png_is_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 60 * 40).reshape(40, 60).astype(np.uint16)
    pixels = np.asarray(decode(encoded(Image.fromarray(values), "PNG"), MAX_PIXELS))
    np.testing.assert_array_equal(pixels[..., 1], np.rint(values / 257))


def test_values_without_a_known_range_are_rejected():
    floats = encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF")
    wide = encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")
    for content in (floats, wide):
        assert "no known range" in error_of(content).detail


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animated_image_is_rejected(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    error = error_of(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert error.reason == "animated_image"
    assert "3 frames" in error.detail


def test_a_gif_with_one_frame_is_accepted():
    assert difference(decode(encoded(photo(), "GIF"), MAX_PIXELS), photo()) < 12


def test_a_phone_photo_with_a_preview_is_accepted():
    content = encoded(photo(), "MPO", save_all=True, append_images=[photo(30, 20)], quality=95)
    assert Image.open(io.BytesIO(content)).n_frames == 2
    assert difference(decode(content, MAX_PIXELS), photo()) < 4


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 4, 8))
    for content in (encoded(image, "PNG"), encoded(image, "WEBP", lossless=True)):
        decoded = decode(content, MAX_PIXELS)
        assert decoded.mode == "RGB"
        assert decoded.getpixel((7, 0)) == (255, 255, 255)
        assert decoded.getpixel((0, 0)) == (0, 0, 200)


def test_a_transparent_palette_colour_becomes_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 250, 10, 10])
    image.putpixel((0, 0), 0)
    decoded = decode(encoded(image, "PNG", transparency=0), MAX_PIXELS)
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 1)) == (250, 10, 10)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_images_become_rgb(mode):
    decoded = decode(encoded(photo().convert("L").convert(mode), "PNG"), MAX_PIXELS)
    assert decoded.mode == "RGB"
    if mode != "1":
        assert difference(decoded, photo().convert("L").convert("RGB")) == 0


def test_the_exif_rotation_is_applied_and_removed():
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode(encoded(photo(), "JPEG", exif=exif, quality=95), MAX_PIXELS)
    assert decoded.size == (40, 60)
    assert difference(decoded, photo().transpose(Image.Transpose.ROTATE_270)) < 4
    assert not decoded.info
    assert not decoded.getexif()


def test_a_too_large_image_is_rejected_before_it_is_decoded():
    content = encoded(Image.new("1", (20_000, 20_000)), "PNG")
    error = error_of(content, max_pixels=100_000_000)
    assert error.reason == "too_large_image"
    assert "20000 × 20000" in error.detail
    assert "max_image_pixels=100000000" in error.detail


def test_the_spec_and_not_pillow_sets_the_limit():
    assert decode(encoded(Image.new("1", (12_000, 8_000)), "PNG"), 100_000_000).width == 12_000


def test_an_eps_file_is_not_run():
    assert "known format" in error_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").detail


def test_a_large_jpeg_decoded_at_a_reduced_size_looks_the_same():
    content = encoded(photo(1600, 1200), "JPEG", quality=95)
    reduced = decode(content, MAX_PIXELS, at_least=128)
    assert reduced.size == (200, 150)
    whole = to_square(decode(content, MAX_PIXELS), 64, "stretch")
    assert difference(to_square(reduced, 64, "stretch"), whole) < 1


def test_stretch_keeps_the_whole_image():
    square = to_square(photo(), 20, "stretch")
    assert square.size == (20, 20)
    assert difference(square, photo(20, 20)) < 5


def test_crop_keeps_the_centre():
    square = to_square(photo(60, 40), 40, "crop")
    assert difference(square, photo(60, 40).crop((10, 0, 50, 40))) == 0


def test_pad_keeps_the_aspect_ratio_with_black_bars():
    pixels = np.asarray(to_square(photo(60, 40), 30, "pad"))
    assert pixels.shape == (30, 30, 3)
    assert not pixels[:5].any()
    assert not pixels[-5:].any()
    assert pixels[5:25].all()


def test_the_stored_jpeg_is_read_back_as_rgb():
    content = prepare_image(encoded(photo(), "PNG"), PrepareSpec(image_size=32))
    pixels = decode_stored(content)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert difference(pixels, to_square(photo(), 32, "stretch")) < 2


def test_the_stored_bytes_do_not_depend_on_metadata():
    plain, noted = encoded(photo(), "JPEG"), encoded(photo(), "JPEG", comment=b"of the patient")
    assert plain != noted
    spec = PrepareSpec(image_size=32, aspect="crop", jpeg_quality=90)
    first, second = (prepare_image(content, spec) for content in (plain, noted))
    assert first == second
    assert first == encode_jpeg(to_square(decode(plain, MAX_PIXELS), 32, "crop"), 90)


@pytest.mark.parametrize("content", [b"", b"no jpeg"])
def test_stored_bytes_that_are_not_a_jpeg_raise_an_error(content):
    with pytest.raises(ValueError, match="bytes are not a JPEG"):
        decode_stored(content)


def test_a_huge_size_in_a_stored_header_is_rejected_before_memory_is_allocated():
    content = encode_jpeg(Image.new("RGB", (16, 16)), 90)
    # OpenCV would allocate 12 GB for 64,000 × 64,000 pixels.
    huge = with_size(content, content.index(b"\xff\xc0") + 5, ">HH", 64_000, 64_000)
    with pytest.raises(
        ValueError, match=r"its shape is \(64000, 64000, 3\), but the manifest says"
    ):
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


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


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
    assert difference(decode(encoded(photo(), "JPEG2000"), MAX_PIXELS), photo()) < 2


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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_rotation_results_in_the_upright_photo(orientation):
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = photo()
    if orientation in undo:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert (
        difference(decode(encoded(stored, "JPEG", exif=exif, quality=95), MAX_PIXELS), photo()) < 4
    )


def damaged_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 1
    content = encoded(photo(), "JPEG", exif=exif, quality=95)
    place = content.index(b"Exif\0\0") + 6 + 8
    return content[:place] + b"\x09\x00" + content[place + 2 :]


def test_damaged_metadata_causes_no_warning_in_any_thread():
    content = damaged_exif()
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(io.BytesIO(content)).getexif()
    before = list(warnings.filters)
    found: list[object] = []

    def work() -> None:
        for _ in range(20):
            found.append(decode(content, MAX_PIXELS).size)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(60, 40)] * 80
    assert list(warnings.filters) == before


def test_raw_storage_holds_the_pixels_of_the_square():
    content = encoded(photo(), "PNG")
    stored = prepare_image(content, PrepareSpec(image_size=32, aspect="crop", store="raw"))
    assert stored == np.asarray(to_square(decode(content, MAX_PIXELS), 32, "crop")).tobytes()
