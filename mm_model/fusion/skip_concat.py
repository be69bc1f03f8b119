"""Passes the concatenated branch features through dense blocks with skip connections."""

from keras import KerasTensor, layers

from mm_model.layers.blocks import BlockBuilder
from mm_model.spec import FusionSpec


def build(image: dict, numeric: dict, spec: FusionSpec, blocks: BlockBuilder) -> KerasTensor:
    """Return joint features (B, F) from the branches' pooled features."""
    both_BF = layers.Concatenate(name="fusion_concat")([image["pooled"], numeric["pooled"]])
    x = blocks.dense(both_BF, spec.units, "fusion_0", skip=True)
    return blocks.dense(x, spec.units, "fusion_1", skip=True)
