"""Shows the trials of a search, best first: on the terminal, as log lines and as a CSV file."""

import csv
import io
import time
from typing import TYPE_CHECKING

from ray_jobs.config.text import NONE, number_text
from ray_jobs.storage.folder import Folder
from ray_jobs.tune.results.search_state import PARTS, Search, TrialRow
from ray_jobs.tune.results.searched_settings import searched_settings, value_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

LEADERBOARD = "leaderboard.csv"

_MAX_ROWS = 12
_REFRESH_S = 0.5
_STYLES = {"finished": "green", "stopped": "dim", "failed": "red"}


class LiveLeaderboard:
    """Prints a line for each trial that ends, and on a terminal a live table.

    Args:
        title: Line to print first.
        console: Console to print to.
    """

    def __init__(self, title: str, console: "Console | None" = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = console or Console(highlight=False)
        self.title = title
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self._refreshed_at = 0.0

    def __enter__(self) -> "LiveLeaderboard":
        self.console.print(self.title, soft_wrap=True)
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(f"  {text}", style="dim", soft_wrap=True, markup=False)

    def show(self, search: Search, ended: TrialRow | None) -> None:
        """Refresh the table, and print a line if a trial has just ended."""
        if ended is not None:
            self.console.print(_ended_line(search, ended), soft_wrap=True)
        now = time.monotonic()
        if self.console.is_terminal and (ended or now - self._refreshed_at > _REFRESH_S):
            self._refreshed_at = now
            self.live.update(leaderboard_table(search), refresh=True)


def leaderboard_table(search: Search) -> "Table":
    """Return the best trials as a table, with the spent budget as its caption."""
    from rich.table import Table

    settings = searched_settings(search.trials)
    metrics = search.objectives
    table = Table(caption=spent_text(search), caption_justify="left", box=None, pad_edge=False)
    for column in ("trial", "state", "epochs", *metrics, *(s.name for s in settings)):
        table.add_column(column, justify="left" if column in ("trial", "state") else "right")
    for row in search.ranked()[:_MAX_ROWS]:
        table.add_row(
            row.name,
            row.state,
            str(row.epochs),
            *(score_text(row.scores.get(metric)) for metric in metrics),
            *(value_text(row.values[s.path]) if s.path in row.values else NONE for s in settings),
            style=_STYLES.get(row.state),
        )
    return table


def write_leaderboard(search: Search, folder: Folder) -> None:
    """Write all trials to leaderboard.csv in the search folder, best first."""
    metrics = search.objectives
    paths = [setting.path for setting in searched_settings(search.trials)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    in_full = [f"{metric} in full" for metric in metrics]
    seconds = [f"{part}_s" for part in PARTS]
    head = ["rank", "trial", "state", *metrics, *in_full, "epochs", "best_epoch", *seconds, *paths]
    writer.writerow([*head, "error"])
    for rank, row in enumerate(search.ranked(), start=1):
        cells = [rank, row.name, row.state]
        cells += [scores.get(m, "") for scores in (row.scores, row.scores_in_full) for m in metrics]
        cells += [row.epochs, "" if row.best_epoch is None else row.best_epoch + 1]
        cells += [round(row.seconds.get(part, 0.0), 3) for part in PARTS]
        cells += [row.values.get(path, "") for path in paths]
        writer.writerow([*cells, row.error or ""])
    folder.write_text(LEADERBOARD, stream.getvalue())


def score_text(score: float | None) -> str:
    """Return a score with four decimals, or four significant digits if very small or large."""
    return number_text(score, 4 if score is not None and 0.01 <= abs(score) < 100 else None)


def spent_text(search: Search) -> str:
    """Return the number of trials by state and the spent budget as text."""
    counts = search.count_states().items()
    trials = ", ".join(f"{count} {state}" for state, count in counts if count)
    parts = [trials or "no trials yet"]
    for name, unit in (("hours", "h"), ("cpu_hours", "CPU h"), ("gpu_hours", "GPU h")):
        spent, limit = search.spent.get(name, 0.0), search.budget.get(name)
        if limit is not None or spent >= 0.005:
            of = f" of {limit:g}" if limit is not None else ""
            parts.append(f"{spent:.2f}{of} {unit}")
    return "  ".join(parts)


def _ended_line(search: Search, row: TrialRow) -> "Text":
    from rich.text import Text

    metric = search.objectives[0]
    values = ", ".join(
        f"{s.name} {value_text(row.values[s.path])}" for s in searched_settings([row])
    )
    is_best = search.scored()[:1] == [row]
    result = row.error or f"{metric} {score_text(row.scores.get(metric))}"
    mark = "  best" if is_best else ""
    return Text(
        f"  {row.name}  {row.state:<8}  epoch {row.epochs:>3}  {result}{mark}  ({values})",
        style="bold green" if is_best else _STYLES.get(row.state, ""),
    )
