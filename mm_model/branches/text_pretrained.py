"""Text branches with a backbone that can have pretrained weights."""

from keras import KerasTensor

from mm_model.backbones.hub import make_hub_text
from mm_model.layers.blocks import BlockBuilder
from mm_model.spec import TextSpec


def build(
    ids_RL: KerasTensor,
    mask_RL: KerasTensor,
    num_tokens: int,
    spec: TextSpec,
    blocks: BlockBuilder,
) -> KerasTensor:
    """Return the features (R, L, F) of the tokens.

    Raises:
        ValueError: If the backbone does not support texts of this length, or KerasHub is missing.
        OSError: If the backbone's weights cannot be downloaded, found or read.
    """
    backbone = make_hub_text(spec.kind, num_tokens, ids_RL.shape[1], spec.weights)
    backbone.trainable = spec.trainable
    return backbone([ids_RL, mask_RL])
