"""Prints the progress of a run to the terminal.

Rank 0 posts events to the coordinator; the driver fetches and prints them.
"""

import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray_jobs.train.telemetry import history_keys as keys

if TYPE_CHECKING:
    from rich.console import Console

Event = dict[str, Any]

_POLL_S = 0.25
_HEADER = "  epoch   step  rows/s  data wait  train loss  val loss  val AUC  val acc"
_STARTING = "starting workers"
_MIN_STARTUP_PART_S = 0.05
_STARTUP_PARTS = {
    keys.STARTUP_RAY_S: "Ray",
    keys.STARTUP_WORKERS_S: "workers",
    keys.STARTUP_IMPORTS_S: "imports",
    keys.STARTUP_BUILD_S: "build",
    keys.STARTUP_CHECKPOINT_S: "checkpoint",
    keys.STARTUP_FIRST_STEP_S: "first step",
}
_NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"


@contextmanager
def show_progress(coordinator: Any, title: str) -> Iterator[None]:
    """Print the events of a coordinator until the block ends, then kill the coordinator."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    console = ProgressConsole(title)
    done = threading.Event()

    def poll() -> None:
        is_last, calls = False, []
        while not is_last:
            is_last = done.wait(_POLL_S)
            calls.append(coordinator.take.remote())
            try:
                while calls:
                    for event in ray.get(calls[0], timeout=10):
                        console.show(event)
                    del calls[0]
            except GetTimeoutError:
                # A busy node starts actors slowly. The call will still return its events.
                continue
            except RayError:
                # The coordinator died with its node or job; training does not depend on it.
                return

    poller = threading.Thread(target=poll, name="progress", daemon=True)
    with console:
        poller.start()
        try:
            yield
        finally:
            done.set()
            poller.join(timeout=15)
            ray.kill(coordinator)


class ProgressConsole:
    """Prints a line per epoch and event; on a terminal, also a progress bar of the steps."""

    def __init__(self, title: str, console: "Console | None" = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = console or Console(highlight=False)
        self.title = title
        self.has_header = False
        self.saved = ""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(_STARTING, total=None, speed="")

    def __enter__(self) -> "ProgressConsole":
        self.console.print(self.title, soft_wrap=True)
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, event: Event) -> None:
        """Print an event; ignore unknown kinds."""
        match event["kind"]:
            case "step":
                rate, loss = event[keys.ROWS_PER_S], event[keys.TRAIN_LOSS]
                self.bar.update(
                    self.task,
                    description=f"epoch {event[keys.EPOCH] + 1}",
                    completed=event["done"],
                    total=event["total"],
                    speed=f"{rate:,.0f} rows/s  loss {loss:.4f}{self.saved}",
                )
            case "epoch":
                if not self.has_header:
                    self.has_header = True
                    self.console.print(_HEADER, style="bold")
                self.console.print(_epoch_line(event))
            case "note" | "stage" | "preemption":
                self._print(event["text"], "dim")
            case "startup":
                self._print(_startup_text(event["parts"]), "dim")
            case "checkpoint":
                self.saved = f"  saved at {event['step']:,}"
            case "failure":
                limit = f" of at most {event['most']}" if event["most"] >= 0 else ""
                self._print(f"failure {event['attempt']}{limit}: {event['text']}", "yellow")
                self.bar.tasks[0].total = None
                self.bar.reset(self.task, description=_STARTING, speed="")

    def _print(self, text: str, style: str) -> None:
        """Print a paragraph with a hanging indent."""
        from rich.text import Text

        lines = textwrap.wrap(
            text,
            self.console.width,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        # A Text, because error messages are not markup, and because `print(style=…)` would also
        # color the progress bar.
        self.console.print(Text("\n".join(lines).replace(_NO_BREAK_SPACE, " "), style=style))


def _startup_text(parts: dict[str, float]) -> str:
    # No-break spaces keep a part on one line.
    texts = [
        f"{_STARTUP_PARTS[key]} {seconds:.1f}".replace(" ", _NO_BREAK_SPACE)
        for key, seconds in parts.items()
        if seconds >= _MIN_STARTUP_PART_S
    ]
    return f"started in {sum(parts.values()):.1f} s: {', '.join(texts)}"


def _epoch_line(record: Event) -> str:
    def number(key: str, width: int) -> str:
        value = record.get(key)
        return f"{value:>{width}.4f}" if value is not None else f"{'-':>{width}}"

    wait = f"{100 * record[keys.DATA_WAIT_S] / max(record[keys.EPOCH_S], 1e-9):.0f} %"
    line = (
        f"  {record[keys.EPOCH] + 1:>5}  {record[keys.STEP]:>5}"
        f"  {record[keys.ROWS_PER_S]:>6,.0f}  {wait:>9}  {number(keys.TRAIN_LOSS, 10)}"
        f"  {number(keys.VAL_LOG_LOSS, 8)}  {number(keys.VAL_ROC_AUC, 7)}"
        f"  {number(keys.VAL_ACCURACY, 7)}"
    )
    return line + ("  [green]best[/green]" if record.get("best") else "")
