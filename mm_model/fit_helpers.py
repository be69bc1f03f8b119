"""Class weights and callbacks for `model.fit` on arrays in one process."""

import keras
import numpy as np


def balanced_class_weight(
    y: np.ndarray, sample_weight: np.ndarray | None = None
) -> dict[int, float]:
    """Return the weight of each class, computed as in sklearn's `compute_class_weight("balanced")`.

    Args:
        y: Labels 0 or 1, of any shape.
        sample_weight: Weight of each row. Multiply it by the weight of the row's class for `fit`.

    Raises:
        ValueError: If a label is not 0 or 1, or a class has no rows.
    """
    labels = np.asarray(y).reshape(-1)
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(labels)[:5].tolist()}")
    weights = None if sample_weight is None else np.asarray(sample_weight, np.float64).reshape(-1)
    sums = np.bincount(labels.astype(np.int64), weights, minlength=2).tolist()
    return balanced_weights(sums[0], sums[1])


def balanced_weights(num_negative: float, num_positive: float) -> dict[int, float]:
    """Return the balanced weight of each class from the number, or total weight, of its rows.

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
