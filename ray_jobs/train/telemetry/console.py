"""What a run says of itself: the keys of its history, its progress, the terminal.

Rank 0 posts events to the coordinator; the driver reads and prints them. Tune schedules on the
keys, so they are defined once, here.
"""

import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

EPOCH = "epoch"
STEP = "step"
TRAIN_LOSS = "train/loss"
LEARNING_RATE = "train/learning_rate"
VAL_LOG_LOSS = "val/log_loss"
VAL_ROC_AUC = "val/roc_auc"
VAL_PR_AUC = "val/pr_auc"
VAL_ACCURACY = "val/accuracy"
INFERENCE_ROW_S = "inference/row_s"
ROWS_PER_S = "data/rows_per_s"
DATA_WAIT_S = "data/wait_s"
EPOCH_S = "time/epoch_s"
STEP_S = "time/step_s"
COLLECTIVE_S = "time/collective_s"
VALIDATION_S = "time/validation_s"
CHECKPOINT_S = "time/checkpoint_s"
STARTUP_RAY_S = "startup/ray_s"
STARTUP_WORKERS_S = "startup/workers_s"
STARTUP_IMPORTS_S = "startup/imports_s"
STARTUP_BUILD_S = "startup/build_s"
STARTUP_CHECKPOINT_S = "startup/checkpoint_s"
STARTUP_FIRST_STEP_S = "startup/first_step_s"
WORKER_BYTES = "memory/worker_bytes"
NODE_MEMORY_FRACTION = "memory/node_used_fraction"
CPU_CORES = "cpu/process_cores"
GPU_UTILIZATION = "gpu/utilization"
GPU_BYTES = "gpu/memory_bytes"
GPU_PEAK_BYTES = "gpu/memory_peak_bytes"

FALLING = (VAL_LOG_LOSS, INFERENCE_ROW_S)
"""Keys of what is better the less it is; of the other metrics it is the more."""

HISTORY = "history.jsonl"
"""File of a run folder: a record an epoch, as a line of JSON."""
HISTORY_TABLE = "history.parquet"
"""The same as a table."""

Event = dict[str, Any]

_POLL_S = 0.25
_STARTING = "starting workers"
_WORTH_SAYING_S = 0.05
_PARTS = {
    STARTUP_RAY_S: "Ray",
    STARTUP_WORKERS_S: "workers",
    STARTUP_IMPORTS_S: "imports",
    STARTUP_BUILD_S: "build",
    STARTUP_CHECKPOINT_S: "checkpoint",
    STARTUP_FIRST_STEP_S: "first step",
}
_UNBROKEN = "\N{NO-BREAK SPACE}"


def rank(key: str, value: float | None) -> float:
    """Return a number that is lower the better a metric is."""
    if value is None:
        return float("inf")
    return value if key in FALLING else -value


@contextmanager
def shown(coordinator: Any, title: str) -> Iterator[None]:
    """Show the events of a coordinator on the terminal until the block ends."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    screen = ProgressConsole(title)
    done = threading.Event()

    def follow() -> None:
        last, taken = False, []
        while not last:
            last = done.wait(_POLL_S)
            taken.append(coordinator.take.remote())
            try:
                while taken:
                    for event in ray.get(taken[0], timeout=10):
                        screen.show(event)
                    del taken[0]
            except GetTimeoutError:
                # A busy node starts actors slowly. The call stands, with the events it takes.
                continue
            except RayError:
                # The coordinator died with its node or job; training does not depend on it.
                return

    follower = threading.Thread(target=follow, name="progress", daemon=True)
    with screen:
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join(timeout=15)
            ray.kill(coordinator)


class ProgressConsole:
    """A line for each epoch and incident, and on a terminal a bar for the steps in between."""

    def __init__(self, title: str, console: "Console | None" = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = console or Console(highlight=False)
        self.title = title
        self.started = time.monotonic()
        self.header_shown = False
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
        """Show one event; one of an unknown kind is left out."""
        show = {
            "step": self._step,
            "epoch": self._epoch,
            "note": self._note,
            "stage": self._note,
            "startup": self._startup,
            "checkpoint": self._checkpoint,
            "failure": self._failure,
        }.get(event["kind"])
        if show is not None:
            show(event)

    def _step(self, event: Event) -> None:
        self.bar.update(
            self.task,
            description=f"epoch {event[EPOCH] + 1}",
            completed=event["done"],
            total=event["total"],
            speed=f"{event[ROWS_PER_S]:,.0f} rows/s  loss {event[TRAIN_LOSS]:.4f}{self.saved}",
        )

    def _epoch(self, event: Event) -> None:
        if not self.header_shown:
            self.header_shown = True
            self.console.print(
                "  epoch   step  rows/s  data wait  train loss  val loss  val AUC  val acc",
                style="bold",
            )
        self.console.print(_epoch_line(event))

    def _note(self, event: Event) -> None:
        self._print(event["text"], "dim")

    def _startup(self, event: Event) -> None:
        parts = event["parts"]
        each = [f"{_PARTS[key]} {s:.1f}" for key, s in parts.items() if s >= _WORTH_SAYING_S]
        # Lines break between the parts, not in them.
        text = ", ".join(part.replace(" ", _UNBROKEN) for part in each)
        self._print(f"started in {sum(parts.values()):.1f} s: {text}", "dim")

    def _checkpoint(self, event: Event) -> None:
        self.saved = f"  saved at {event['step']:,}"

    def _failure(self, event: Event) -> None:
        most = f" of at most {event['most']}" if event["most"] >= 0 else ""
        self._print(f"failure {event['attempt']}{most}: {event['text']}", "yellow")
        self.bar.tasks[0].total = None
        self.bar.reset(self.task, description=_STARTING, speed="")

    def _print(self, text: str, style: str) -> None:
        """Print a paragraph, whose further lines stand a little further in."""
        from rich.text import Text

        lines = textwrap.wrap(
            text,
            self.console.width,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        shown = "\n".join(lines).replace(_UNBROKEN, " ")
        # As a Text, since the texts of errors are no markup, and since a style of the whole print
        # would colour the bar below, too.
        self.console.print(Text(shown, style=style))


def _epoch_line(record: Event) -> str:
    def number(key: str, width: int, digits: int = 4) -> str:
        value = record.get(key)
        return f"{value:>{width}.{digits}f}" if value is not None else f"{'-':>{width}}"

    wait = f"{100 * record[DATA_WAIT_S] / max(record[EPOCH_S], 1e-9):.0f} %"
    line = (
        f"  {record[EPOCH] + 1:>5}  {record[STEP]:>5}  {record[ROWS_PER_S]:>6,.0f}  {wait:>9}"
        f"  {number(TRAIN_LOSS, 10)}  {number(VAL_LOG_LOSS, 8)}  {number(VAL_ROC_AUC, 7)}"
        f"  {number(VAL_ACCURACY, 7)}"
    )
    return line + ("  [green]best[/green]" if record.get("best") else "")
