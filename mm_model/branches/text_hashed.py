"""Text branch whose tokens are hashed words and pairs of words, with learned vectors.

As fastText (Joulin et al. 2017, "Bag of Tricks for Efficient Text Classification", arXiv
1607.01759), it ignores the order of the text beyond pairs.
"""

from keras import KerasTensor

from mm_model.layers.blocks import BlockBuilder
from mm_model.layers.text_stack import TokenEmbedding
from mm_model.spec import TextSpec

_WIDTH = 64


def build(
    ids_RL: KerasTensor,
    mask_RL: KerasTensor,
    num_tokens: int,
    spec: TextSpec,
    blocks: BlockBuilder,
) -> KerasTensor:
    """Return the vectors (R, L, F) of the tokens."""
    embed = TokenEmbedding(num_tokens, _WIDTH, name="text_embedding")
    embed.trainable = spec.trainable
    return embed(ids_RL)
