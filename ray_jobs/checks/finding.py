"""Defines the result of a check, with a remedy if it found a problem."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's output.

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
    def sentence(self) -> str:
        """Check, text and remedy in one line."""
        return f"{self.check}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


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
