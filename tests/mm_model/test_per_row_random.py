import threading

import keras
import numpy as np
import pytest

from mm_model import per_row_random


@pytest.mark.parametrize("count", [1, 2, 4])
def test_several_parts_together_draw_what_keras_draws_and_advance_equally(count):
    theirs = keras.random.SeedGenerator(5)
    seeds = [keras.random.SeedGenerator(5) for _ in range(count)]
    for row_shape in ((), (3,), (2, 5)):
        parts = []
        for index, seed in enumerate(seeds):
            with per_row_random.batch_part(index, count):
                shape = (8 // count, *row_shape)
                parts.append(np.asarray(per_row_random.uniform(shape, seed, -1.0, 3.0)))
        expected = keras.random.uniform((8, *row_shape), -1.0, 3.0, seed=theirs)
        np.testing.assert_array_equal(np.concatenate(parts), expected)
    for seed in seeds:
        np.testing.assert_array_equal(seed.state, theirs.state)


def test_a_part_applies_to_its_thread_and_ends_with_its_block():
    seen: list[np.ndarray] = []

    def draw() -> None:
        seen.append(np.asarray(per_row_random.uniform((2,), keras.random.SeedGenerator(1))))

    with per_row_random.batch_part(1, 2):
        with per_row_random.batch_part(0, 2):
            draw()
        draw()
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
    draw()
    whole = np.asarray(per_row_random.uniform((4,), keras.random.SeedGenerator(1)))
    np.testing.assert_array_equal(seen, [whole[:2], whole[2:], whole[:2], whole[:2]])
