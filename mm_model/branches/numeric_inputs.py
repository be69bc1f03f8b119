"""Builds the numeric branch, from numbers and categories to its features per row."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import layers

from mm_model.branches import NUMERIC_BRANCHES, load_builder
from mm_model.layers.blocks import BlockBuilder
from mm_model.layers.category_embedding import CategoryEmbedding
from mm_model.layers.numeric_encoding import NumericEncoding
from mm_model.spec import ModelSpec
from mm_model.statistics import NumericStatistics, Vocabulary


def build_numeric_branch(
    inputs: dict[str, Any],
    spec: ModelSpec,
    statistics: NumericStatistics | None,
    shape: Sequence[int] | None,
    vocabularies: Sequence[Vocabulary],
    blocks: BlockBuilder,
) -> dict[str, Any]:
    """Return the numeric branch's features, and add the branch's inputs to `inputs`.

    The features also contain `encoded`, the encoded numbers and categories (B, E), and `columns`,
    the column of each of the E components.
    """
    encoded: list[Any] = []
    columns: list[int] = []
    num_columns = _num_columns(statistics, shape, vocabularies)
    if num_columns:
        inputs["numeric"] = x = keras.Input((num_columns,), name="numeric")
        if statistics is not None:
            bins = spec.numeric.bins if spec.numeric.encoding == "piecewise_linear" else None
            encode = NumericEncoding(statistics, bins, name="numeric_encoding")
            x, columns = encode(x), encode.columns
        else:
            columns = list(range(num_columns))
        encoded.append(x)
    if vocabularies:
        inputs["category"] = x = keras.Input((len(vocabularies),), dtype="int32", name="category")
        dropout = spec.numeric.category_dropout
        embed = CategoryEmbedding(vocabularies, dropout, spec.l2, name="category_embedding")
        encoded.append(embed(x))
        columns += [num_columns + column for column in embed.columns]
    x = layers.Concatenate(name="numeric_concat")(encoded) if len(encoded) > 1 else encoded[0]
    features = load_builder(NUMERIC_BRANCHES[spec.numeric.kind])(x, spec.numeric, blocks)
    return {**features, "encoded": x, "columns": columns}


def _num_columns(
    statistics: NumericStatistics | None,
    shape: Sequence[int] | None,
    vocabularies: Sequence[Vocabulary],
) -> int:
    if shape is not None and len(shape) != 1:
        raise ValueError(f"numeric shape {tuple(shape)} is invalid; pass (columns,)")
    known = None if statistics is None else len(statistics.columns)
    if shape is not None and known is not None and shape[0] != known:
        raise ValueError(
            f"numeric shape {tuple(shape)} does not match the number of columns in the statistics, "
            f"{known}"
        )
    num_columns = int(shape[0]) if shape is not None else known or 0
    if not num_columns and not vocabularies:
        raise ValueError(
            "the numeric branch has neither numbers nor categories; pass numeric statistics, a "
            "numeric shape or vocabularies, or set model.numeric.kind=none"
        )
    return num_columns
