import numpy as np

from mm_model.layers.affine_logit import AffineLogit


def test_an_affine_logit_is_not_trainable_and_can_be_set():
    layer = AffineLogit([0.5, 0.5])
    logits = np.array([[1.0, 3.0], [2.0, -2.0]], np.float32)
    np.testing.assert_allclose(np.asarray(layer(logits)), [[2.0], [0.0]])
    assert layer.trainable_variables == []
    layer.set([1.0, 0.0], bias=-1.0)
    np.testing.assert_allclose(np.asarray(layer(logits)), [[0.0], [1.0]])
