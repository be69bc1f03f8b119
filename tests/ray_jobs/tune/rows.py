"""Searches as they stand, made up."""

from typing import Any

from ray_jobs.tune.results.search_state import Mode, Objective, Search, TrialRow

LOSS, AUC, ROW_S = "val/log_loss", "val/roc_auc", "inference/row_s"


def trial(place: int, score: Any, values: dict[str, Any] | None = None, **fields: Any) -> TrialRow:
    """Return a finished trial with a score, of the metric LOSS where it is one number."""
    scores = score if isinstance(score, dict) else {} if score is None else {LOSS: score}
    row = TrialRow(f"t{place:03d}", "finished", {"train.learning_rate": 1e-3}, scores)
    row.values = {"train.learning_rate": 1e-3 * (place + 1)} if values is None else values
    for name, value in fields.items():
        setattr(row, name, value)
    return row


def search(*trials: TrialRow, metrics: tuple[tuple[str, Mode], ...] = ((LOSS, "min"),)) -> Search:
    """Return a search with these trials."""
    return Search("some search", [Objective(*metric) for metric in metrics], list(trials))


def records(*values: Any) -> list[dict[str, Any]]:
    """Return a record for each value of LOSS."""
    return [{"epoch": epoch, LOSS: value} for epoch, value in enumerate(values)]
