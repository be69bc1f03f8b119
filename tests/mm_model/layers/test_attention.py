import keras
import numpy as np

from mm_model.layers.attention import ColumnTokens, PrependQuery, TokenPresence


def test_a_column_token_is_the_linear_map_of_its_components_plus_its_identity():
    columns = [0, 1, 2, 1, 1, 2]
    layer = ColumnTokens(columns, width=4)
    encoded = np.random.default_rng(0).normal(size=(5, len(columns))).astype(np.float32)
    tokens = np.asarray(layer(encoded))
    kernel, identity = np.asarray(layer.kernel_CKD), np.asarray(layer.identity_CD)
    expected = np.tile(identity, (5, 1, 1))
    used = dict.fromkeys(range(3), 0)
    for component, column in enumerate(columns):
        expected[:, column] += encoded[:, [component]] * kernel[column, used[column]]
        used[column] += 1
    np.testing.assert_allclose(tokens, expected, atol=1e-5)


def test_initial_tokens_of_columns_of_any_number_of_components_have_equal_variance():
    columns = [0] + [1] * 50
    encoded = np.random.default_rng(0).normal(size=(500, 51)).astype(np.float32)
    layer = ColumnTokens(columns, width=256)
    tokens = np.asarray(layer(encoded)) - np.asarray(layer.identity_CD)
    np.testing.assert_allclose(tokens.var(axis=(0, 2)), 1.0, atol=0.2)


def test_tokens_of_missing_parts_are_absent():
    tokens = np.ones((2, 6, 3), np.float32)
    mask = np.asarray([[1, 0, 1], [0, 0, 0]], np.float32)
    present = np.asarray(TokenPresence()([tokens, mask]))
    np.testing.assert_array_equal(present, [[1, 1, 0, 0, 1, 1], [0] * 6])
    np.testing.assert_array_equal(TokenPresence()([tokens]), np.ones((2, 6)))


def test_the_query_is_always_present():
    layer = PrependQuery()
    tokens, mask = layer([np.ones((2, 3, 4), np.float32), np.zeros((2, 3), np.float32)])
    query = np.asarray(layer.query)[0]
    np.testing.assert_array_equal(tokens, np.stack([np.concatenate([query, np.ones((3, 4))])] * 2))
    np.testing.assert_array_equal(mask, np.tile([[[True, False, False, False]]], (2, 1, 1)))


def test_absent_tokens_do_not_change_the_joint_features():
    from mm_model.fusion.cross_attention import build
    from mm_model.layers.blocks import BlockBuilder
    from mm_model.spec import FusionSpec, ModelSpec

    inputs = [keras.Input((6, 5)), keras.Input((3,)), keras.Input((2, 5))]
    image = {"tokens": inputs[0], "mask": inputs[1]}
    blocks = BlockBuilder(ModelSpec())
    spec = FusionSpec(units=8)
    joint = build({"image": image, "numeric": {"tokens": inputs[2]}}, list, spec, blocks)
    model = keras.Model(inputs, joint)
    rng = np.random.default_rng(0)
    tokens, numeric = rng.normal(size=(4, 6, 5)), rng.normal(size=(4, 2, 5))
    mask = np.asarray([[1, 1, 0]] * 4)
    expected = np.asarray(model([tokens, mask, numeric]))
    tokens[:, 4:] = 7
    np.testing.assert_array_equal(model([tokens, mask, numeric]), expected)
    tokens[:, 0] = 7
    assert (np.asarray(model([tokens, mask, numeric])) != expected).any(axis=1).all()
