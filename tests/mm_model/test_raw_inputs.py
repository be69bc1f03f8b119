"""Files and words in a graph give the inputs that `prepare` and the feed make of them."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mm_model import create_model
from mm_model.raw_inputs import StoredFormat, raw_inputs, raw_signature
from mm_model.statistics import Vocabulary
from ray_jobs.config.prepare_spec import PrepareSpec
from ray_jobs.data.images import decode_stored, prepare_image, resize
from tests.mm_model.examples import (
    COLOUR,
    UNTRAINED,
    model_with_all_inputs,
    rows_with_all_inputs,
)

SIZES = [(61, 40), (40, 61), (33, 33), (200, 50), (9, 14)]


def image_file(size: tuple[int, int], mode: str = "RGB", kind: str = "JPEG") -> bytes:
    rng = np.random.default_rng(sum(size))
    small = rng.integers(0, 256, (5, 5, 4)).astype(np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


FILES = [
    *(image_file(size) for size in SIZES),
    image_file((50, 41), "L"),
    image_file((50, 41), "RGBA", "PNG"),
    image_file((50, 41), "P", "PNG"),
]


def model_of(side: int) -> Any:
    return create_model((side, side, 3), (0,), vocabularies=[COLOUR], **UNTRAINED)


@pytest.mark.parametrize("aspect", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("store", ["jpeg", "raw"])
@pytest.mark.parametrize("side", [32, 24, 16, 13])
def test_pixels_are_those_of_the_stored_images(aspect, store, side):
    import tensorflow as tf

    spec = PrepareSpec(image_size=32, aspect=aspect, store=store, jpeg_quality=90)
    expected = []
    for file in FILES:
        content = prepare_image(file, spec).content
        shape, stored = (side, side, 3), (32, 32, 3)
        if store == "raw":
            pixels = resize(np.frombuffer(content, np.uint8).reshape(stored), shape)
        else:
            pixels = decode_stored(content, stored, shape)
        expected.append(pixels)
    quality = None if store == "raw" else 90
    convert = raw_inputs(model_of(side), StoredFormat(32, aspect, quality), [COLOUR], 128)
    raw = {"image": tf.constant([*FILES, b""]), "words": tf.constant([["red"]] * (len(FILES) + 1))}
    *images, missing = convert(raw)["image"].numpy().astype(int)
    assert (missing == 128).all()
    difference = np.abs(np.stack(images) - np.stack(expected))
    # Pillow resamples tall images first along their columns, so these differ by some levels.
    by_file = difference.mean(axis=(1, 2, 3))
    assert np.median(by_file) < 0.2
    assert by_file.max() < 2


def test_words_have_their_codes_and_missing_images_are_masked():
    import tensorflow as tf

    inputs, _ = rows_with_all_inputs(4, num_images=2)
    model = model_with_all_inputs(inputs)
    signature = raw_signature(model)
    shapes = {name: tuple(spec.shape[1:]) for name, spec in signature.items()}
    assert shapes == {"image": (2,), "numeric": (3,), "words": (1,), "text": (2, 6),
                      "text_mask": (2, 6)}  # fmt: skip
    words = ["green", "", "violet", "red"]
    files = [[FILES[0], b""], [b"", FILES[1]], [FILES[2], FILES[3]], [b"", b""]]
    raw = {name: tf.constant(inputs[name], spec.dtype) for name, spec in signature.items()
           if name in inputs and name != "image"}  # fmt: skip
    raw |= {"image": tf.constant(files), "words": tf.constant(words)[:, None]}
    converted = raw_inputs(model, StoredFormat(16, "stretch", 95), [COLOUR])(raw)
    codes = COLOUR.codes([word or None for word in words])
    assert converted["category"].numpy()[:, 0].tolist() == codes.tolist()
    assert converted["image_mask"].numpy().tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]
    assert np.isfinite(np.asarray(model(converted))).all()
    no_words = Vocabulary(column="colour", words=())
    converted = raw_inputs(model, StoredFormat(16, "stretch", 95), [no_words])(raw)
    assert converted["category"].numpy()[:, 0].tolist() == [1, 0, 1, 1]
