"""What a check found, and what mends it."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Args:
        check: its name.
        status: an error keeps a job from working, a warning may.
        text: what was found.
        remedy: what mends it.
    """

    check: str
    status: Status
    text: str
    remedy: str = ""

    @property
    def sentence(self) -> str:
        """Finding and remedy in one."""
        return f"{self.check}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


def ok(check: str, text: str) -> Finding:
    """Return that all is well."""
    return Finding(check, "ok", text)


def error(check: str, text: str, remedy: str) -> Finding:
    """Return what keeps a job from working."""
    return Finding(check, "error", text, remedy)


def warning(check: str, text: str, remedy: str) -> Finding:
    """Return what may keep a job from working, or slow it down."""
    return Finding(check, "warning", text, remedy)


def skipped(check: str, text: str) -> Finding:
    """Return that a check was not made, and why."""
    return Finding(check, "skipped", text)
