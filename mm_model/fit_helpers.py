"""Class weights and callbacks for `model.fit` on arrays in one process."""

import keras
import numpy as np


def balanced_class_weight(y: np.ndarray) -> dict[int, float]:
    """Return the weight of each class, computed as in sklearn's `compute_class_weight("balanced")`.

    Args:
        y: Labels 0 or 1, of any shape.

    Raises:
        ValueError: If a label is not 0 or 1, or a class has no rows.
    """
    labels = np.asarray(y).reshape(-1)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(labels)[:5].tolist()}")
    return balanced_weights(*(int((labels == label).sum()) for label in (0, 1)))


def balanced_weights(num_negative: int, num_positive: int) -> dict[int, float]:
    """Return the balanced weight of each class from the number of its rows.

    Raises:
        ValueError: If a class has no rows.
    """
    if not (num_negative and num_positive):
        raise ValueError(
            f"balanced class weights need rows of both classes, got {num_negative} with label 0 "
            f"and {num_positive} with label 1"
        )
    total = num_negative + num_positive
    return {0: total / (2 * num_negative), 1: total / (2 * num_positive)}


def default_callbacks(
    monitor: str = "val_loss", patience: int = 10
) -> list[keras.callbacks.Callback]:
    """Return two callbacks: early stopping, and a lower learning rate at a plateau.

    Early stopping restores the best weights.

    Args:
        monitor: Metric to monitor; lower is better if its name ends in `loss`, else higher.
        patience: Epochs without improvement before stopping; the learning rate is cut after a third
        of that number.
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
