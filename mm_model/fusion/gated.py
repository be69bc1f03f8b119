"""Gated multimodal unit, whose gate per row and feature weighs the image against the numbers.

Arevalo et al. 2017, "Gated Multimodal Units for Information Fusion", arXiv 1702.01992.
"""

from keras import KerasTensor, layers

from mm_model.layers.blocks import BlockBuilder
from mm_model.spec import FusionSpec


def build(image: dict, numeric: dict, spec: FusionSpec, blocks: BlockBuilder) -> KerasTensor:
    """Return joint features (B, F) from the branches' pooled features."""
    image_BF = blocks.dense(image["pooled"], spec.units, "fusion_image", skip=True)
    numeric_BF = blocks.dense(numeric["pooled"], spec.units, "fusion_numeric", skip=True)
    both_BF = layers.Concatenate(name="fusion_concat")([image["pooled"], numeric["pooled"]])
    gate_BF = layers.Dense(spec.units, activation="sigmoid", name="fusion_gate")(both_BF)
    difference_BF = layers.Subtract(name="fusion_difference")([image_BF, numeric_BF])
    gated_BF = layers.Multiply(name="fusion_chosen")([gate_BF, difference_BF])
    return layers.Add(name="fusion_add")([numeric_BF, gated_BF])
