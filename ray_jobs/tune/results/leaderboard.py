"""The leaderboard on the terminal while a search runs; elsewhere a line for each trial's end."""

import time
from typing import TYPE_CHECKING, Any

from ray_jobs.tune.results.figures import score_text
from ray_jobs.tune.results.search_progress import settings, value_text
from ray_jobs.tune.results.search_state import Search, TrialRow

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_ROWS = 12
_PAUSE_S = 0.5
_ENDS = {"finished": "green", "stopped": "dim", "failed": "red"}


class LiveLeaderboard:
    """Shows a search; on a terminal as a table that is kept up to date.

    Args:
        title: shown above it.
        console: to print to.
    """

    def __init__(self, title: str, console: "Console | None" = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = console or Console(highlight=False)
        self.title = title
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self._shown_at = 0.0

    def __enter__(self) -> "LiveLeaderboard":
        self.console.print(self.title, soft_wrap=True)
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def note(self, text: str) -> None:
        """Show a line."""
        self.console.print(f"  {text}", style="dim", soft_wrap=True, markup=False)

    def show(self, search: Search, ended: TrialRow | None) -> None:
        """Show how a search stands, and which trial has just ended, if one has."""
        if ended is not None:
            self.console.print(_ended_line(search, ended), soft_wrap=True)
        now = time.monotonic()
        if self.console.is_terminal and (ended or now - self._shown_at > _PAUSE_S):
            self._shown_at = now
            self.live.update(table(search), refresh=True)


def table(search: Search, rows: int = _ROWS) -> "RenderableType":
    """Return the best trials as a table, with what was spent below it."""
    from rich.table import Table

    names = {setting.path: setting.name for setting in settings(search.trials)}
    metrics = [o.metric for o in search.objectives]
    shown = Table(caption=spent_text(search), caption_justify="left", box=None, pad_edge=False)
    for column in ("trial", "state", "epochs", *metrics, *names.values()):
        shown.add_column(column, justify="left" if column in ("trial", "state") else "right")
    for row in search.ranked()[:rows]:
        shown.add_row(
            row.name,
            row.state,
            str(row.epochs),
            *(score_text(row.scores.get(metric)) for metric in metrics),
            *(value_text(row.values[path]) if path in row.values else "–" for path in names),
            style=_ENDS.get(row.state),
        )
    return shown


def spent_text(search: Search) -> str:
    """Return what a search has done and spent, of what it may."""
    counts = {state: 0 for state in ("finished", "stopped", "failed", "running")}
    for row in search.trials:
        counts[row.state] = counts.get(row.state, 0) + 1
    trials = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    parts = [trials or "no trial yet"]
    for name, unit in (("hours", "h"), ("cpu_hours", "CPU h"), ("gpu_hours", "GPU h")):
        spent, most = search.spent.get(name, 0.0), search.budget.get(name)
        if most is not None or spent >= 0.005:
            of = f" of {most:g}" if most is not None else ""
            parts.append(f"{spent:.2f}{of} {unit}")
    return "  ".join(parts)


def _ended_line(search: Search, row: TrialRow) -> Any:
    from rich.text import Text

    objective = search.objectives[0]
    values = ", ".join(f"{s.name} {value_text(row.values[s.path])}" for s in settings([row]))
    score = row.scores.get(objective.metric)
    best = score is not None and search.ranked()[0] is row
    what = row.error or f"{objective.metric} {score_text(score)}"
    mark = "  best" if best else ""
    return Text(
        f"  {row.name}  {row.state:<8}  epoch {row.epochs:>3}  {what}{mark}  ({values})",
        style="bold green" if best else _ENDS.get(row.state, ""),
    )
