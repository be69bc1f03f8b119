"""Defines the explanation of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Explanation:
    """What a model looks at; empty if it was not explained."""

    num_rows: int = 0
    """Rows that importance and partial dependence are measured on."""
    importance: Sequence[Mapping[str, Any]] = ()
    """Result of `permutation_importance`."""
    partial_dependence: Sequence[Mapping[str, Any]] = ()
    """Results of `partial_dependence` of the most important columns."""
    missing_modalities: Sequence[Mapping[str, Any]] = ()
    """Result of `missing_modalities`."""
    maps: Mapping[int, np.ndarray] = field(default_factory=dict)
    """For each explained row, the maps of its images, (images, height, width)."""
    map_similarity: float | None = None
    """Result of `map_similarity`; None without maps."""
    contributions: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """For each explained row, what each column adds to the logit."""

    def figures(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return everything but the maps, as plain numbers; rows have their keys."""
        return {
            "num_rows": self.num_rows,
            "importance": list(self.importance),
            "partial_dependence": list(self.partial_dependence),
            "missing_modalities": list(self.missing_modalities),
            "map_similarity": self.map_similarity,
            "contributions": {keys[row]: parts for row, parts in self.contributions.items()},
        }
