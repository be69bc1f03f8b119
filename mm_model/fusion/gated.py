"""Gated multimodal unit, whose gates per row and feature weigh the modalities against each other.

Arevalo et al. 2017, "Gated Multimodal Units for Information Fusion", arXiv 1702.01992. With two
modalities, their gates are g and 1 - g, as in the paper; with more, the gates are a softmax.
"""

from typing import Any

from keras import KerasTensor, layers, ops

from mm_model.fusion import Hide
from mm_model.layers.blocks import BlockBuilder
from mm_model.spec import FusionSpec


def build(
    branches: dict[str, dict], hide: Hide, spec: FusionSpec, blocks: BlockBuilder
) -> KerasTensor:
    """Return joint features (B, F) from the branches' pooled features."""
    pooled = hide([branch["pooled"] for branch in branches.values()])
    values = [
        blocks.dense(pooled_BF, spec.units, f"fusion_{name}", skip=True)
        for name, pooled_BF in zip(branches, pooled, strict=True)
    ]
    all_BF = layers.Concatenate(name="fusion_concat")(pooled)
    if len(values) == 2:
        first_BF, second_BF = values
        gate_BF = layers.Dense(spec.units, activation="sigmoid", name="fusion_gate")(all_BF)
        difference_BF = layers.Subtract(name="fusion_difference")([first_BF, second_BF])
        gated_BF = layers.Multiply(name="fusion_chosen")([gate_BF, difference_BF])
        return layers.Add(name="fusion_add")([second_BF, gated_BF])
    count = len(values)
    gates: Any = layers.Dense(count * spec.units, name="fusion_gate")(all_BF)
    gates_BMF = layers.Reshape((count, spec.units), name="fusion_gates")(gates)
    gates_BMF = layers.Softmax(axis=1, name="fusion_softmax")(gates_BMF)
    stacked = layers.Concatenate(name="fusion_values")(values)
    values_BMF = layers.Reshape((count, spec.units), name="fusion_stack")(stacked)
    gated_BMF = layers.Multiply(name="fusion_chosen")([gates_BMF, values_BMF])
    joint_BF: Any = ops.sum(gated_BMF, axis=1)
    return joint_BF
