from typing import Any

import keras
import pytest
import tensorflow as tf

from ray_jobs.cluster.strategy import Replicas, WorkerContext
from ray_jobs.train.checkpoints.snapshot import Copier
from tests.ray_jobs.arrays import arrays_of, identical


@pytest.fixture
def model() -> Any:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(3)]
    return keras.Sequential(layers)


def make_copier(model: Any) -> Copier:
    return Copier(model.variables, Replicas(tf.distribute.get_strategy(), WorkerContext()))


def change(model: Any) -> None:
    for variable in model.trainable_variables:
        variable.assign(variable + 1.0)


def test_a_copy_does_not_change_with_the_model(model):
    copy = make_copier(model)()
    before = arrays_of(model.variables)
    assert identical(copy, before)
    change(model)
    assert identical(copy, before)
    assert not identical(make_copier(model)(), before)


def test_a_copy_can_reuse_the_memory_of_an_earlier_one(model):
    copy = make_copier(model)
    first, kept = copy(), copy()
    addresses = [array.ctypes.data for array in first.values()]
    before = arrays_of(model.variables)
    change(model)
    again = copy(first)
    assert identical(again, arrays_of(model.variables))
    assert identical(kept, before)
    assert [array.ctypes.data for array in again.values()] == addresses
