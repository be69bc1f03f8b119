"""Numeric branch that passes encoded numbers and categories through dense blocks with skips."""

from keras import KerasTensor, layers

from mm_model.layers.blocks import BlockBuilder
from mm_model.spec import NumericSpec


def build(encoded_BF: KerasTensor, spec: NumericSpec, blocks: BlockBuilder) -> dict:
    """Return pooled features and one token, computed from encoded numbers and categories."""
    x = encoded_BF
    for i, units in enumerate(spec.units):
        x = blocks.dense(x, units, f"numeric_{i}", skip=True)
    tokens_BTF = layers.Reshape((1, x.shape[-1]), name="numeric_token")(x)
    return {"pooled": x, "tokens": tokens_BTF}
