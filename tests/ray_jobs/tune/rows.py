"""Makes up trials and searches for tests of their results."""

from typing import Any

from ray_jobs.tune.results.search_state import Search, TrialRow

LOSS, AUC, ROW_S = "val/log_loss", "val/roc_auc", "inference/row_s"


def trial(number: int, score: Any, values: dict[str, Any] | None = None, **fields: Any) -> TrialRow:
    """Return a finished trial; `score` is the value of LOSS, or a value per metric."""
    scores = score if isinstance(score, dict) else {} if score is None else {LOSS: score}
    row = TrialRow(f"t{number:03d}", "finished", {"train.learning_rate": 1e-3}, scores)
    row.values = {"train.learning_rate": 1e-3 * (number + 1)} if values is None else values
    for name, value in fields.items():
        setattr(row, name, value)
    return row


def search(*trials: TrialRow, metrics: tuple[str, ...] = (LOSS,)) -> Search:
    """Return a search with these trials."""
    return Search("some search", metrics, list(trials))


def records(*values: Any, metric: str = LOSS) -> list[dict[str, Any]]:
    """Return a history with one record for each value of a metric."""
    return [{"epoch": epoch, metric: value} for epoch, value in enumerate(values)]
