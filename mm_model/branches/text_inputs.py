"""Builds the text branch, from token ids to its features per row.

Shapes: B rows, C text columns, L tokens per text, R = B × C texts, F features.
"""

from dataclasses import dataclass
from typing import Any

import keras

from mm_model.backbones.tokenizer import TextReader
from mm_model.branches import TEXT_BRANCHES, load_builder
from mm_model.layers.blocks import BlockBuilder
from mm_model.layers.dropout import RowDropout
from mm_model.layers.text_stack import FoldTexts, UnfoldTexts
from mm_model.spec import ModelSpec


@dataclass(frozen=True)
class TextShape:
    """Shape of a model's text input."""

    columns: int
    """Text columns."""
    length: int
    """Tokens per text."""
    num_tokens: int
    """Number of token ids."""

    @classmethod
    def of(cls, reader: TextReader) -> "TextShape":
        """Return the shape of the texts that a reader makes."""
        return cls(*reader.shape, num_tokens=reader.tokenizer.num_tokens)


def build_text_branch(
    inputs: dict[str, Any], spec: ModelSpec, shape: TextShape, blocks: BlockBuilder
) -> tuple[dict[str, Any], list[str]]:
    """Return the text branch's features and the names of its backbone's layers.

    Adds the branch's inputs to `inputs`.
    """
    shape_text = (shape.columns, shape.length)
    inputs["text"] = ids_BCL = keras.Input(shape_text, dtype="int32", name="text")
    inputs["text_mask"] = mask_BCL = keras.Input(shape_text, name="text_mask")
    ids_RL, mask_RL = FoldTexts(name="text_fold")([ids_BCL, mask_BCL])
    build = load_builder(TEXT_BRANCHES[spec.text.kind])
    tokens_RLF = build(ids_RL, mask_RL, shape.num_tokens, spec.text, blocks)
    below = keras.Model([ids_BCL, mask_BCL], tokens_RLF, name="text_backbone").layers
    backbone = [layer.name for layer in below if isinstance(layer, keras.Model)]
    unfold = UnfoldTexts(spec.text.missing_dropout, name="text_unfold")
    pooled, tokens, mask = unfold([tokens_RLF, mask_BCL])
    pooled = RowDropout(spec.dropout, name="text_dropout")(pooled)
    pooled = blocks.dense(pooled, spec.text.units, "text_top")
    return {"pooled": pooled, "tokens": tokens, "mask": mask}, backbone
