from keras import ops

from mm_model.tunable import Tunable, current_value


def test_python_sees_the_initial_value_of_a_tunable_and_the_graph_its_current_one():
    tunable = Tunable(0.25)
    tunable.assign(0.5)
    assert tunable == 0.25
    assert float(current_value(tunable)) == 0.5
    assert current_value(0.25) == 0.25
    assert current_value(tunable, ops.zeros((), "bfloat16")).dtype == "bfloat16"
