import keras
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from mm_model.fit import balanced_class_weight, default_callbacks
from mm_model.optimizer import make_optimizer
from mm_model.spec import OptimizerSpec


@pytest.mark.parametrize("positives", [1, 30, 99])
def test_class_weights_agree_with_scikit_learn(positives):
    y = np.array([1] * positives + [0] * (100 - positives))
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=y)
    assert balanced_class_weight(y[:, None]) == pytest.approx(dict(enumerate(expected)))


@pytest.mark.parametrize(
    ("y", "message"),
    [([1, 1], "both classes are needed"), ([0, 2], r"must be 0 or 1, got \[0, 2\]")],
)
def test_labels_that_cannot_be_weighed_say_why(y, message):
    with pytest.raises(ValueError, match=message):
        balanced_class_weight(np.array(y))


def test_default_callbacks_stop_early_with_the_best_weights_and_lower_the_rate():
    stop, plateau = default_callbacks(monitor="val_auc", patience=6)
    assert isinstance(stop, keras.callbacks.EarlyStopping)
    assert stop.restore_best_weights
    assert (stop.mode, stop.patience) == ("max", 6)
    assert isinstance(plateau, keras.callbacks.ReduceLROnPlateau)
    assert plateau.patience == 2


def test_the_cosine_schedule_climbs_to_the_peak_and_ends_at_zero():
    optimizer = make_optimizer(OptimizerSpec(learning_rate=0.1, warmup_fraction=0.1), 100)
    rates = []
    for step in (0, 5, 10, 55, 100):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.05, 0.0], abs=1e-6)


def test_a_cosine_schedule_without_an_end_is_refused():
    with pytest.raises(ValueError, match="needs the number of steps"):
        make_optimizer(OptimizerSpec(schedule="cosine"))
