"""A small convolutional image branch for tests, the demo and small data."""

from keras import KerasTensor, layers

from mm_model.layers.blocks import BlockBuilder
from mm_model.spec import ImageSpec


def build(image_BHWC: KerasTensor, spec: ImageSpec, blocks: BlockBuilder) -> dict:
    """Return pooled features and tokens, computed from pixels 0-255."""
    if spec.weights:
        raise ValueError(
            f"model.image.weights={spec.weights} does not apply to model.image.kind=tiny, which "
            "has no pretrained weights; set weights to none"
        )
    x = layers.Rescaling(1 / 127.5, offset=-1.0, name="image_range")(image_BHWC)
    for i, filters in enumerate((16, 32, 64)):
        convolution = layers.Conv2D(
            filters, 3, strides=2, padding="same", use_bias=False, name=f"image_conv{i}"
        )
        batch_norm = blocks.batch_norm(f"image_conv{i}_bn")
        convolution.trainable = batch_norm.trainable = spec.trainable
        x = batch_norm(convolution(x))
        x = layers.Activation(blocks.spec.activation, name=f"image_conv{i}_activation")(x)
    pooled_BF = layers.GlobalAveragePooling2D(name="image_pool")(x)
    tokens_BTF = layers.Reshape((-1, x.shape[-1]), name="image_tokens")(x)
    return {"pooled": top(pooled_BF, spec, blocks), "tokens": tokens_BTF}


def top(pooled_BF: KerasTensor, spec: ImageSpec, blocks: BlockBuilder) -> KerasTensor:
    """Return the branch's features, computed from its pooled backbone features."""
    return blocks.dense(pooled_BF, spec.units, "image_top")
