"""Passes the concatenated branch features through dense blocks with skip connections."""

from keras import KerasTensor, layers

from mm_model.fusion import Hide
from mm_model.layers.blocks import BlockBuilder
from mm_model.spec import FusionSpec


def build(
    branches: dict[str, dict], hide: Hide, spec: FusionSpec, blocks: BlockBuilder
) -> KerasTensor:
    """Return joint features (B, F) from the branches' pooled features."""
    pooled = hide([branch["pooled"] for branch in branches.values()])
    all_BF = layers.Concatenate(name="fusion_concat")(pooled)
    x = blocks.dense(all_BF, spec.units, "fusion_0", skip=True)
    return blocks.dense(x, spec.units, "fusion_1", skip=True)
