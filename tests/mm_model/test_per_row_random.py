import threading

import keras
import numpy as np
import pytest
from keras import ops

from mm_model import per_row_random
from mm_model.layers.category_embedding import CategoryEmbedding
from mm_model.layers.dropout import ModalityDropout, RowDropout
from mm_model.statistics import Vocabulary
from tests.mm_model.examples import in_parts

WORDS = Vocabulary(column="letter", words=tuple("abcdefgh"))


def test_one_part_draws_what_keras_draws():
    ours, theirs = keras.random.SeedGenerator(3), keras.random.SeedGenerator(3)
    for shape in ((4,), (6, 2), (3, 1, 5)):
        got = per_row_random.uniform(shape, ours, -1.0, 3.0)
        np.testing.assert_array_equal(got, keras.random.uniform(shape, -1.0, 3.0, seed=theirs))
    np.testing.assert_array_equal(ours.state, theirs.state)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_several_parts_draw_what_one_part_draws_and_advance_equally(count):
    whole = keras.random.SeedGenerator(5)
    seeds = [keras.random.SeedGenerator(5) for _ in range(count)]
    for _ in range(2):
        parts = []
        for index, seed in enumerate(seeds):
            with per_row_random.batch_part(index, count):
                parts.append(np.asarray(per_row_random.uniform((8 // count, 3), seed)))
        np.testing.assert_array_equal(np.concatenate(parts), per_row_random.uniform((8, 3), whole))
    for seed in seeds:
        np.testing.assert_array_equal(seed.state, whole.state)


def test_a_part_applies_to_its_thread_and_ends_with_its_block():
    def first(seen: list) -> None:
        seen.append(np.asarray(per_row_random.uniform((2,), keras.random.SeedGenerator(1))))

    seen: list[np.ndarray] = []
    with per_row_random.batch_part(1, 2):
        with per_row_random.batch_part(0, 2):
            first(seen)
        first(seen)
        thread = threading.Thread(target=first, args=(seen,))
        thread.start()
        thread.join()
    first(seen)
    whole = np.asarray(per_row_random.uniform((4,), keras.random.SeedGenerator(1)))
    for got, expected in zip(seen, (whole[:2], whole[2:], whole[:2], whole[:2]), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_dropout_of_a_row_does_not_depend_on_the_number_of_parts(count):
    x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    codes = np.random.default_rng(0).integers(0, WORDS.num_codes, (16, 1))
    embedding = CategoryEmbedding([WORDS], dropout=0.5)
    embedding.build((None, 1))

    def embed(rows, training=True):
        layer = CategoryEmbedding([WORDS], dropout=0.5, seed=1)
        layer.build((None, 1))
        layer.set_weights(embedding.get_weights())
        return layer(rows, training=training)

    def hide(rows, training=True):
        hidden = ModalityDropout(0.8, seed=1)([rows, rows], training=training)
        return ops.concatenate(hidden, axis=1)

    def drop(rows, training=True):
        return RowDropout(0.5, seed=1)(rows, training=training)

    for call, rows in ((embed, codes), (hide, x), (drop, x)):
        whole = np.asarray(call(rows))
        np.testing.assert_array_equal(in_parts(lambda call=call: call, rows, count), whole)
        changed = (whole != np.asarray(call(rows, training=False))).any(axis=1)
        assert changed.sum() > 0
        assert call is drop or changed.sum() < len(rows)
