import keras
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from mm_model.fit_helpers import balanced_class_weight, default_callbacks


@pytest.mark.parametrize("positives", [1, 30, 99])
def test_class_weights_agree_with_scikit_learn(positives):
    y = np.array([1] * positives + [0] * (100 - positives))
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=y)
    assert balanced_class_weight(y[:, None]) == pytest.approx(dict(enumerate(expected)))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([1, 1], "need rows of both classes, got 0 with label 0 and 2 with label 1"),
        ([0, 2], r"must be 0 or 1, got \[0, 2\]"),
    ],
)
def test_labels_without_two_classes_are_rejected_with_the_reason(y, message):
    with pytest.raises(ValueError, match=message):
        balanced_class_weight(np.array(y))


def test_default_callbacks_stop_early_with_the_best_weights_and_lower_the_rate():
    stop, plateau = default_callbacks(monitor="val_auc", patience=6)
    assert isinstance(stop, keras.callbacks.EarlyStopping)
    assert stop.restore_best_weights
    assert (stop.mode, stop.patience) == ("max", 6)
    assert isinstance(plateau, keras.callbacks.ReduceLROnPlateau)
    assert plateau.patience == 2


@pytest.mark.parametrize("weight", [0.001, 1.0, 70_000.0])
def test_class_weights_of_weighted_rows_agree_with_scikit_learn(weight):
    y = np.array([1] * 3 + [0] * 7)
    weights = weight * np.arange(1, 11)
    expected = compute_class_weight(
        "balanced", classes=np.array([0, 1]), y=y, sample_weight=weights
    )
    found = balanced_class_weight(y[:, None], weights[:, None])
    assert found == pytest.approx(dict(enumerate(expected)))
