"""Measures how far rows are from the training rows of a run, in the features of its model.

Shapes: B rows of a batch, N training rows, F features.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ray_jobs.predict.trained_run import TrainedRun
from ray_jobs.train.finalize import EMBEDDINGS, read_sample

_NEIGHBOR = 10
_QUANTILE = 0.99
_SPLITS = ("train", "validation")


class RowDistance:
    """The distance of rows from a sample of training rows; above 1 for unfamiliar rows.

    For each head, the distance is that between the row's embedding and its 10th nearest training
    embedding (Sun et al. 2022, "Out-of-Distribution Detection with Deep Nearest Neighbors", arXiv
    2204.06507; Euclidean and without normalization, which would hide extreme numbers). Distances
    are scaled by those of the validation rows, so that heads can be compared. A row has the largest
    distance of its heads; 99 % of the validation rows have a distance of at most 1.

    Args:
        train: Embeddings of training rows (N, F) by head.
        validation: Embeddings of validation rows by head.
    """

    def __init__(self, train: Sequence[np.ndarray], validation: Sequence[np.ndarray]) -> None:
        self._train = [embedding_NF.astype(np.float64) for embedding_NF in train]
        by_head = self._by_head(validation)
        self._units = [max(np.quantile(each, _QUANTILE), 1e-12) for each in by_head]
        self._unit = 1.0
        self._unit = max(float(np.quantile(self(validation), _QUANTILE)), 1e-12)

    @classmethod
    def of(cls, run: TrainedRun) -> "RowDistance | None":
        """Return the distance from the training rows of a run; None if the run does not store them.

        Runs of earlier versions and means of several models store none.
        """
        rows = read_sample(run.folder, EMBEDDINGS)
        if rows is None:
            return None
        parts = [rows.filter(pa.array(rows["split"].to_numpy() == s)) for s in _SPLITS]
        train, validation = (
            [np.stack(part[f"embedding_{head}"].to_numpy()) for head in run.heads] for part in parts
        )
        return cls(train, validation)

    def __call__(self, embeddings: Sequence[np.ndarray]) -> np.ndarray:
        """Return the distances (B,), given embeddings (B, F) by head."""
        relative = zip(self._by_head(embeddings), self._units, strict=True)
        return np.max([distance_B / unit for distance_B, unit in relative], axis=0) / self._unit

    def _by_head(self, embeddings: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [
            _neighbor_distance(row_BF.astype(np.float64), train_NF)
            for row_BF, train_NF in zip(embeddings, self._train, strict=True)
        ]


def _neighbor_distance(row_BF: np.ndarray, train_NF: np.ndarray) -> np.ndarray:
    """Return the distance (B,) of each row from its 10th nearest training row."""
    neighbor = min(_NEIGHBOR, len(train_NF)) - 1
    square_BN = (row_BF**2).sum(axis=1)[:, None] + (train_NF**2).sum(axis=1)
    square_BN -= 2 * row_BF @ train_NF.T
    return np.sqrt(np.maximum(np.partition(square_BN, neighbor, axis=1)[:, neighbor], 0))
