"""Defines a finding: what a check of data, a cluster or a model has found.

docs/findings.md explains the codes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ray_jobs.config.errors import JobError

Severity = Literal["ok", "skipped", "note", "warning", "error"]
_MARKS = {
    "ok": "[green]✓[/green]",
    "skipped": "[dim]–[/dim]",
    "note": "[dim]·[/dim]",
    "warning": "[bold yellow]![/bold yellow]",
    "error": "[bold red]✗[/bold red]",
}


@dataclass(frozen=True)
class Finding:
    """One line of output, with a second one for the remedy.

    Args:
        code: Identifier to filter by, such as `leak`.
        severity: An error stops a job. A warning may stop or slow down a job, or invalidate a model
            or its evaluation. A note needs no action.
        text: What was found, with counts; the reason why the check was skipped.
        remedy: What to do about it.
    """

    code: str
    severity: Severity
    text: str
    remedy: str = ""

    @property
    def advice(self) -> str:
        """Text and remedy in one line."""
        return self.text + (f"; {self.remedy}" if self.remedy else "")

    @property
    def sentence(self) -> str:
        """Code, text and remedy in one line."""
        return f"{self.code}: {self.advice}"


def ok(code: str, text: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(code, "ok", text)


def error(code: str, text: str, remedy: str) -> Finding:
    """Return a problem that stops a job."""
    return Finding(code, "error", text, remedy)


def note(code: str, text: str) -> Finding:
    """Return a fact worth knowing that needs no action."""
    return Finding(code, "note", text)


def warning(code: str, text: str, remedy: str = "") -> Finding:
    """Return a problem that may stop or slow down a job, or invalidate a model."""
    return Finding(code, "warning", text, remedy)


def skipped(code: str, text: str) -> Finding:
    """Return the reason why a check did not run."""
    return Finding(code, "skipped", text)


def from_message(code: str, message: str, remedy: str = "") -> Finding:
    """Return an error from a message of the form `problem; remedy`."""
    text, _, own_remedy = message.partition("; ")
    return error(code, text, own_remedy or remedy)


def print_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Print findings as they come, and return them."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    found = []
    for finding in findings:
        found.append(finding)
        console.print(f"{_MARKS[finding.severity]} {finding.code:<19} {escape(finding.text)}")
        if finding.remedy:
            console.print(f"  {'':<19} → {escape(finding.remedy)}")
    return found


def require_no_error(findings: Iterable[Finding]) -> None:
    """Check that no finding is an error.

    Raises:
        JobError: With the first error.
    """
    if errors := [finding.sentence for finding in findings if finding.severity == "error"]:
        count = f"{len(errors)} errors, the first: " if len(errors) > 1 else ""
        raise JobError(f"{count}{errors[0]}")
