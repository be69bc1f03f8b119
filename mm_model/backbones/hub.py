"""Transformer backbones of KerasHub, for images and texts.

Weights come from a preset, from a folder in KerasHub's layout, or from a folder in the layout of
Hugging Face, which KerasHub converts. A folder also determines the size of the backbone.

Shapes: B rows, H × W pixels, T tokens, F features, R texts, L tokens of a text.
"""

import json
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from mm_model.backbones import HUB_IMAGES, HUB_TEXTS, HubKind, is_location
from mm_model.backbones.tokenizer import Subwords, read_tokenizer
from mm_model.backbones.weight_files import fetch_weights
from mm_model.compat_keras import all_layers, convert_layer
from mm_model.layers.dropout import RowDropout

_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
_HALF = ([0.5] * 3, [0.5] * 3)
_PIXEL_RANGES = {"ViTBackbone": _HALF, "SigLIPBackbone": _HALF}
"""Mean and deviation of the channels of pixels 0-1 in training; by default, those of ImageNet."""
_NUM_PREFIX_TOKENS = {"ViTBackbone": 1, "DeiTBackbone": 2, "DINOV2Backbone": 1, "DINOV3Backbone": 1}
"""Tokens before those of the patches, without registers."""
_OPTIONS = {
    "SwinTransformerBackbone": {"drop_path": 0.0},
    "DINOV2Backbone": {"drop_path_rate": 0.0, "use_mask_token": False},
    "DINOV3Backbone": {"drop_path_rate": 0.0, "use_mask_token": False},
}
"""No stochastic depth, whose random numbers would depend on the number of replicas, and no tokens
that are used in pretraining only."""
_HUGGING_FACE = {
    "vit": "ViTBackbone",
    "deit": "DeiTBackbone",
    "dinov2": "DINOV2Backbone",
    "dinov2_with_registers": "DINOV2Backbone",
    "dinov3_vit": "DINOV3Backbone",
    "swin": "SwinTransformerBackbone",
    "bert": "BertBackbone",
    "distilbert": "DistilBertBackbone",
    "roberta": "RobertaBackbone",
}
"""Backbone of each `model_type` of Hugging Face that KerasHub converts."""


class UnsupportedError(ValueError):
    """A folder with weights, or a shape of images, does not fit a kind of backbone."""


def import_keras_hub(what: str = "this backbone") -> Any:
    """Return the module `keras_hub`.

    Raises:
        ValueError: If it is not installed; the message says that `what` needs it.
    """
    try:
        import keras_hub
    except ImportError as error:
        raise ValueError(
            f"{what} needs KerasHub, which is not installed; run "
            '`pip install "multimodal-ray[hub]"`, or choose another kind'
        ) from error
    # Swin's attention takes a mask, about which Keras warns needlessly.
    warnings.filterwarnings("ignore", r"Layer 'attn' \(of type WindowAttention\)", UserWarning)
    return keras_hub


def make_hub_image(kind: str, shape: tuple[int, int, int], weights: str | None) -> keras.Model:
    """Return a model from pixels 0-255 to `pooled` (B, F) and the `tokens` (B, T, F) of patches.

    Args:
        kind: Key of `HUB_IMAGES`.
        shape: Height, width, 3. Position embeddings of pretrained weights are interpolated.
        weights: `preset:NAME`, the path or URI of a folder or a `.weights.h5` file, or None.

    Raises:
        ValueError: If the backbone does not support images of this shape or these weights, or
            KerasHub is missing.
        OSError: If the weights cannot be fetched or read.
    """
    import_keras_hub(f"model.image.kind={kind}")
    hub_kind = HUB_IMAGES[kind]
    mean, std = _PIXEL_RANGES.get(hub_kind.backbone, _IMAGENET)
    # Not numbered, unlike names that Keras chooses. Some backbones prefix their layers with it.
    hub_kind = hub_kind._replace(config={**hub_kind.config, "name": f"{kind}_backbone"})
    if weights is None:
        backbone = _new_image_backbone(hub_kind, shape)
    else:
        with _source(weights, hub_kind, f"model.image.weights={weights} into {kind}") as source:
            backbone = _load_image_backbone(hub_kind, shape, source)
            mean, std = _pixel_range(source) or (mean, std)
    _draw_dropout_per_row(backbone)
    if hub_kind.pool == "head":
        outputs = [backbone.output, backbone.post_layer_norm.output]
        backbone = keras.Model(backbone.input, outputs, name=backbone.name)
    pixels = keras.Input(shape, name="pixels")
    scale, offset = 1 / (255 * np.asarray(std)), -np.asarray(mean) / np.asarray(std)
    rescale: Any = layers.Rescaling(scale.tolist(), offset.tolist(), name="range")
    x: Any = rescale(pixels)
    x = backbone({name: x for name in backbone.input} if isinstance(backbone.input, dict) else x)
    if hub_kind.pool == "head":
        return keras.Model(pixels, {"pooled": x[0], "tokens": x[1]}, name=kind)
    tokens = x if len(x.shape) == 3 else layers.Reshape((-1, x.shape[-1]), name="tokens")(x)
    num_prefix = _NUM_PREFIX_TOKENS.get(hub_kind.backbone, 0)
    num_prefix += getattr(backbone, "num_register_tokens", 0)
    pooled = tokens[:, 0] if hub_kind.pool == "first" else ops.mean(tokens, axis=1)
    patches: Any = tokens[:, num_prefix:]
    # DINOv3 computes the number of patches in the graph, where it would be unknown.
    patches = layers.Reshape(patches.shape[1:], name="patches")(patches)
    return keras.Model(pixels, {"pooled": pooled, "tokens": patches}, name=kind)


def make_hub_text(kind: str, num_tokens: int, length: int, weights: str | None) -> keras.Model:
    """Return a model from token ids (R, L) and their mask to the features (R, L, F) of the tokens.

    Args:
        kind: Key of `HUB_TEXTS`.
        num_tokens: Number of token ids.
        length: L.
        weights: `preset:NAME`, the path or URI of a folder, or None.

    Raises:
        ValueError: If the backbone does not support texts of this length or these weights, or
            KerasHub is missing.
        OSError: If the weights cannot be fetched or read.
    """
    hub_kind = HUB_TEXTS[kind]
    models = import_keras_hub(f"model.text.kind={kind}").models
    backbone_class = getattr(models, hub_kind.backbone)
    if weights is None:
        backbone = backbone_class(vocabulary_size=num_tokens, **hub_kind.config)
    else:
        with _source(weights, hub_kind, f"model.text.weights={weights} into {kind}") as source:
            backbone = backbone_class.from_preset(str(source))
    if length > backbone.max_sequence_length:
        raise ValueError(
            f"data.text_length={length} exceeds the {backbone.max_sequence_length} tokens that "
            f"model.text.kind={kind} supports"
        )
    _draw_dropout_per_row(backbone)
    output = backbone.output
    tokens = output["sequence_output"] if isinstance(output, dict) else output
    # Without the layers on top of the first token, which would stay untrained.
    encoder: Any = keras.Model(backbone.input, tokens, name=f"{kind}_encoder")
    ids_RL = keras.Input((length,), dtype="int32", name="ids")
    mask_RL = keras.Input((length,), name="mask")
    named: dict[str, Any] = {"token_ids": ids_RL, "padding_mask": ops.cast(mask_RL, "int32")}
    if "segment_ids" in backbone.input:
        named["segment_ids"] = ops.zeros_like(ids_RL)
    return keras.Model([ids_RL, mask_RL], encoder(named), name=kind)


def hub_tokenizer(weights: str) -> Subwords:
    """Return the tokenizer of a preset, given as `preset:NAME`, or of a folder with weights.

    Raises:
        ValueError: If KerasHub or `tokenizers` is not installed.
        OSError: If there is none.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if is_location(weights):
            return read_tokenizer(fetch_weights(weights, temporary))
        name = weights.removeprefix("preset:")
        import_keras_hub().models.Tokenizer.from_preset(name).save_to_preset(temporary)
        return read_tokenizer(Path(temporary))


@contextmanager
def _source(weights: str, kind: HubKind, what: str) -> Iterator[Path | str]:
    """Yield the file or folder with weights, or the name of a preset.

    Raises:
        UnsupportedError: If the folder contains another backbone.
        OSError: If anything else fails, also in the body of the `with` statement.
    """
    try:
        with tempfile.TemporaryDirectory() as temporary:
            if not is_location(weights):
                yield weights.removeprefix("preset:")
                return
            path = fetch_weights(weights, temporary)
            if path.is_dir():
                _require_backbone(path, kind)
            yield path
    except UnsupportedError as error:
        raise UnsupportedError(f"cannot load {what}: {error}") from error
    except Exception as error:
        # KerasHub and h5py raise errors of many types.
        raise OSError(
            f"could not load {what}: {error}; set it to another folder or file, to preset:NAME, or "
            "to none"
        ) from error


def _require_backbone(folder: Path, kind: HubKind) -> None:
    """Check that a folder contains a backbone of the right class, in a supported layout."""
    config = json.loads((folder / "config.json").read_text())
    model_type = config.get("model_type")
    found = config.get("class_name") or _HUGGING_FACE.get(model_type)
    if found is None:
        raise UnsupportedError(
            f"its config.json has model_type={model_type}, but Hugging Face folders are supported "
            f"only for {', '.join(_HUGGING_FACE)}"
        )
    if found != kind.backbone:
        raise UnsupportedError(f"it contains a {found}, but this kind is a {kind.backbone}")


def _is_file(source: Path | str) -> bool:
    return isinstance(source, Path) and source.is_file()


def _draw_dropout_per_row(backbone: keras.Model) -> None:
    for layer in all_layers(backbone):
        if type(layer) is layers.Dropout:
            convert_layer(layer, RowDropout)


def _new_image_backbone(kind: HubKind, shape: tuple[int, int, int]) -> Any:
    """Return an untrained backbone; of SigLIP, its image tower."""
    options = {**kind.config, **_OPTIONS.get(kind.backbone, {}), "image_shape": shape}
    if kind.backbone == "SwinTransformerBackbone":
        # Smaller images have fewer patches in the last stage than a window.
        min_size = 32 * options["window_size"]
        if min(shape[:2]) < min_size:
            raise UnsupportedError(
                f"images of shape {shape} are not supported: each side must have at least "
                f"{min_size} pixels"
            )
    models = import_keras_hub().models
    if kind.backbone == "SigLIPBackbone":
        return models.SigLIPVisionEncoder(**options)
    if kind.backbone == "DINOV2Backbone":
        options["position_embedding_shape"] = shape
    try:
        return getattr(models, kind.backbone)(**options)
    except ValueError as error:
        raise UnsupportedError(f"images of shape {shape} are not supported: {error}") from error


def _load_image_backbone(kind: HubKind, shape: tuple[int, int, int], source: Path | str) -> Any:
    """Return a backbone with pretrained weights for images of any shape."""
    if _is_file(source):
        backbone = _new_image_backbone(kind, shape)
        backbone.load_weights(source)
        return backbone
    loaded = getattr(import_keras_hub().models, kind.backbone).from_preset(str(source))
    loaded = getattr(loaded, "vision_encoder", loaded)
    config = {**loaded.get_config(), "name": kind.config["name"]}
    backbone = _new_image_backbone(kind._replace(config=config), shape)
    _copy_weights(loaded, backbone, shape, _NUM_PREFIX_TOKENS.get(kind.backbone, 0))
    return backbone


def _copy_weights(source: Any, target: Any, shape: tuple[int, int, int], num_prefix: int) -> None:
    """Copy weights to a backbone for images of another shape; interpolate position embeddings."""
    # The target has no token that is used in pretraining only.
    weights = [weight for weight in source.weights if weight.name != "mask_token"]
    names = {weight.name: weight for weight in weights}
    for found, weight in zip(weights, target.weights, strict=True):
        if weight.name == "interpolated_position_embeddings":
            # DINOv2 keeps the original ones as well.
            found = names["position_embeddings"]
        if found.shape == weight.shape:
            weight.assign(found)
        elif keras.backend.is_float_dtype(weight.dtype):
            positions = np.asarray(found).reshape(-1, found.shape[-1])
            side = math.isqrt(len(positions) - num_prefix)
            size = np.asarray(shape[:2]) // np.asarray(target.patch_size)
            grid = positions[num_prefix:].reshape(1, side, side, -1)
            grid = np.asarray(ops.image.resize(grid, tuple(size.tolist()), interpolation="bicubic"))
            patches = grid.reshape(-1, found.shape[-1])
            weight.assign(np.concatenate([positions[:num_prefix], patches]).reshape(weight.shape))


def _pixel_range(source: Path | str) -> tuple[Any, Any] | None:
    """Return mean and deviation of the pixels 0-1 that a folder states, or None."""
    if not isinstance(source, Path) or not source.is_dir():
        return None
    for name in ("preprocessor_config.json", "image_converter.json", "preprocessor.json"):
        if not (source / name).exists():
            continue
        tree = json.loads((source / name).read_text())
        if "image_mean" in tree:
            return tree["image_mean"], tree["image_std"]
        config = tree.get("config", {})
        config = config.get("image_converter", {}).get("config", config)
        if config.get("scale") is not None and config.get("offset") is not None:
            std = 1 / (255 * np.broadcast_to(config["scale"], 3))
            return -np.broadcast_to(config["offset"], 3) * std, std
    return None
