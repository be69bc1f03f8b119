import keras

import mm_model
from mm_model.fusion import FUSIONS
from mm_model.model import build_model
from mm_model.spec import FusionSpec, ImageSpec, ModelSpec
from tests.mm_model.examples import rows


def test_all_blocks_have_the_activation_of_the_spec():
    spec = ModelSpec(image=ImageSpec(kind="tiny", weights=None), activation="silu")
    model = build_model(spec, mm_model.fit_numeric_statistics(rows()[1]), (16, 16, 3))
    own = [n for n in model.network.layers if n.name.endswith("_activation")]
    assert {"image_conv0_activation", "numeric_0_activation"} <= {n.name for n in own}
    assert {n.activation for n in own} == {keras.activations.silu}


def test_no_layer_before_a_batch_norm_has_a_bias():
    spec = ModelSpec(image=ImageSpec(kind="tiny", weights=None))
    for fusion in FUSIONS:
        spec = spec.model_copy(update={"fusion": FusionSpec(kind=fusion)})
        network = build_model(spec, None, (16, 16, 3), (3,)).network
        norms = [x for x in network.layers if isinstance(x, keras.layers.BatchNormalization)]
        assert norms
        for norm in norms:
            before = norm.input._keras_history.operation
            assert not getattr(before, "use_bias", False), before.name
