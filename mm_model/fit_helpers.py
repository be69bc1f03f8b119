"""Helpers for `model.fit` on arrays in one process."""

import keras
import numpy as np


def balanced_class_weight(y: np.ndarray) -> dict[int, float]:
    """Return the weight of each class, as scikit-learn's `compute_class_weight("balanced")`.

    Args:
        y: labels 0 or 1, of any shape.

    Raises:
        ValueError: if a label is not 0 or 1, or one class is absent.
    """
    labels = np.asarray(y).reshape(-1)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(labels)[:5].tolist()}")
    return balanced_weights(*(int((labels == label).sum()) for label in (0, 1)))


def balanced_weights(num_negative: int, num_positive: int) -> dict[int, float]:
    """Return the balanced weight of each class from the rows of each.

    Raises:
        ValueError: if one class has no row.
    """
    if not (num_negative and num_positive):
        raise ValueError(
            f"both classes are needed, got {num_negative} rows of 0 and {num_positive} of 1"
        )
    total = num_negative + num_positive
    return {0: total / (2 * num_negative), 1: total / (2 * num_positive)}


def default_callbacks(
    monitor: str = "val_loss", patience: int = 10
) -> list[keras.callbacks.Callback]:
    """Return early stopping with the best weights restored, and less learning rate at a plateau.

    Args:
        monitor: the metric to follow; lower is better if its name ends in `loss`, else higher.
        patience: epochs without a better value before the end; a third of it before each cut of
            the learning rate.
    """
    mode = "min" if monitor.endswith("loss") else "max"
    return [
        keras.callbacks.EarlyStopping(
            monitor=monitor, mode=mode, patience=patience, restore_best_weights=True
        ),
        keras.callbacks.ReduceLROnPlateau(
            monitor=monitor, mode=mode, factor=0.3, patience=max(patience // 3, 1), min_lr=1e-7
        ),
    ]
