"""Transformer in which the tokens of all modalities attend to each other.

Tokens are the positions of each image's feature map, the words of each text, and one token per
number and category. A learned query token gives the joint features. Missing images, the padding of
texts and modalities that dropout hides are masked.

The blocks normalize their input (pre-norm: Xiong et al. 2020, "On Layer Normalization in the
Transformer Architecture", arXiv 2002.04745).
"""

from typing import Any

from keras import KerasTensor, layers

from mm_model.fusion import Hide
from mm_model.layers.attention import ColumnTokens, PrependQuery, TokenPresence
from mm_model.layers.blocks import BlockBuilder
from mm_model.layers.dropout import RowDropout
from mm_model.spec import FusionSpec
from mm_model.tunable import l2_regularizer

_HEAD_WIDTH = 32


def build(
    branches: dict[str, dict], hide: Hide, spec: FusionSpec, blocks: BlockBuilder
) -> KerasTensor:
    """Return joint features (B, F) from the branches' tokens."""
    tokens, presence = [], []
    for name, branch in branches.items():
        mask = [branch["mask"]] if "mask" in branch else []
        tokens_BTD = _tokens(name, branch, spec.units, blocks)
        tokens.append(tokens_BTD)
        presence.append(TokenPresence(name=f"fusion_{name}_presence")([tokens_BTD, *mask]))
    x: Any = layers.Concatenate(axis=1, name="fusion_tokens")(tokens)
    present_BT = layers.Concatenate(axis=1, name="fusion_presence")(hide(presence))
    x, mask_B1T = PrependQuery(name="fusion_query")([x, present_BT])
    for i in range(spec.layers):
        x = _block(x, mask_B1T, f"fusion_block{i}", spec.units, blocks)
    return layers.LayerNormalization(name="fusion_norm")(x[:, 0])


def _tokens(name: str, branch: dict, units: int, blocks: BlockBuilder) -> KerasTensor:
    """Return tokens (B, T, units) of a branch."""
    if "columns" in branch:
        tokenize = ColumnTokens(branch["columns"], units, blocks.spec.l2, name=f"fusion_{name}")
        return tokenize(branch["encoded"])
    x = layers.LayerNormalization(name=f"fusion_{name}_norm")(branch["tokens"])
    regularizer = l2_regularizer(blocks.spec.l2)
    return layers.Dense(units, kernel_regularizer=regularizer, name=f"fusion_{name}")(x)


def _block(
    x: KerasTensor, mask_B1T: KerasTensor, name: str, units: int, blocks: BlockBuilder
) -> KerasTensor:
    """Apply attention between tokens, then a network to each token, each with a skip connection."""
    regularizer = l2_regularizer(blocks.spec.l2)
    y = layers.LayerNormalization(name=f"{name}_attention_norm")(x)
    attend = layers.MultiHeadAttention(
        num_heads=max(units // _HEAD_WIDTH, 1),
        key_dim=min(units, _HEAD_WIDTH),
        kernel_regularizer=regularizer,
        name=f"{name}_attention",
    )
    y = attend(y, y, attention_mask=mask_B1T)
    y = RowDropout(blocks.spec.dropout, name=f"{name}_attention_dropout")(y)
    x = layers.Add(name=f"{name}_attention_add")([x, y])
    y = layers.LayerNormalization(name=f"{name}_norm")(x)
    y = layers.Dense(
        2 * units, blocks.spec.activation, kernel_regularizer=regularizer, name=f"{name}_expand"
    )(y)
    y = layers.Dense(units, kernel_regularizer=regularizer, name=f"{name}_project")(y)
    y = RowDropout(blocks.spec.dropout, name=f"{name}_dropout")(y)
    return layers.Add(name=f"{name}_add")([x, y])
