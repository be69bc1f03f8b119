"""Image branches with a backbone that has pretrained weights."""

from typing import Any

from keras import KerasTensor, layers

from mm_model.backbones.image_backbone import make_backbone, preprocess
from mm_model.layers.blocks import BlockBuilder
from mm_model.layers.dropout import RowDropout
from mm_model.spec import ImageSpec


def build(image_BHWC: KerasTensor, spec: ImageSpec, blocks: BlockBuilder) -> dict:
    """Return pooled features and tokens, computed from pixels 0-255.

    Raises:
        ValueError: If the backbone does not support images of this shape.
        OSError: If the backbone's weights cannot be downloaded, found or read.
    """
    synchronized = blocks.spec.batch_norm == "sync"
    backbone = make_backbone(spec.kind, image_BHWC.shape[1:], spec.weights, synchronized)
    backbone.trainable = spec.trainable
    x: Any = backbone(preprocess(image_BHWC, spec.kind))
    if isinstance(x, dict):
        pooled_BF = layers.Identity(name="image_pool")(x["pooled"])
        tokens_BTF = layers.Identity(name="image_tokens")(x["tokens"])
        return {"pooled": top(pooled_BF, spec, blocks), "tokens": tokens_BTF}
    pooled_BF = layers.GlobalAveragePooling2D(name="image_pool")(x)
    tokens_BTF = layers.Reshape((-1, x.shape[-1]), name="image_tokens")(x)
    return {"pooled": top(pooled_BF, spec, blocks), "tokens": tokens_BTF}


def top(pooled_BF: KerasTensor, spec: ImageSpec, blocks: BlockBuilder) -> KerasTensor:
    """Return the branch's features, computed from its pooled backbone features."""
    pooled_BF = RowDropout(blocks.spec.dropout, name="image_dropout")(pooled_BF)
    return blocks.dense(pooled_BF, spec.units, "image_top")
