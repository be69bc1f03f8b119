"""Defines the result of a check, with a remedy if it found a problem."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ray_jobs.config.errors import JobError

Status = Literal["ok", "warning", "error", "skipped"]
_MARKS = {
    "ok": "[green]✓[/green]",
    "warning": "[bold yellow]![/bold yellow]",
    "error": "[bold red]✗[/bold red]",
    "skipped": "[dim]–[/dim]",
}


@dataclass(frozen=True)
class Finding:
    """One line of output, with a second one for the remedy.

    Args:
        check: Name of the check.
        status: An error stops a job; a warning may stop it or slow it down.
        text: The result, or the reason why the check was skipped.
        remedy: What to do about it.
    """

    check: str
    status: Status
    text: str
    remedy: str = ""

    @property
    def advice(self) -> str:
        """Text and remedy in one line."""
        return self.text + (f"; {self.remedy}" if self.remedy else "")

    @property
    def sentence(self) -> str:
        """Check, text and remedy in one line."""
        return f"{self.check}: {self.advice}"


def ok(check: str, text: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(check, "ok", text)


def error(check: str, text: str, remedy: str) -> Finding:
    """Return a problem that stops a job."""
    return Finding(check, "error", text, remedy)


def warning(check: str, text: str, remedy: str) -> Finding:
    """Return a problem that may stop a job or slow it down."""
    return Finding(check, "warning", text, remedy)


def skipped(check: str, text: str) -> Finding:
    """Return the reason why a check did not run."""
    return Finding(check, "skipped", text)


def from_message(check: str, message: str, remedy: str = "") -> Finding:
    """Return an error from a message of the form `problem; remedy`."""
    text, _, own_remedy = message.partition("; ")
    return error(check, text, own_remedy or remedy)


def print_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Print findings as they come, and return them."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    found = []
    for finding in findings:
        found.append(finding)
        console.print(f"{_MARKS[finding.status]} {finding.check:<14} {escape(finding.text)}")
        if finding.remedy:
            console.print(f"  {'':<14} → {escape(finding.remedy)}")
    return found


def require_no_error(findings: Iterable[Finding]) -> None:
    """Check that no finding is an error.

    Raises:
        JobError: With the first error.
    """
    if errors := [finding.sentence for finding in findings if finding.status == "error"]:
        count = f"{len(errors)} errors, the first: " if len(errors) > 1 else ""
        raise JobError(f"{count}{errors[0]}")
