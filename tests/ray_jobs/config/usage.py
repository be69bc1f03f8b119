"""Errors of a command line, as text."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from ray_jobs.config.errors import UsageError


def usage_error(
    capsys: pytest.CaptureFixture[str], parse: Callable[..., Any], *arguments: Any
) -> str:
    """Return the error of a command line in one line, without the frame that tyro draws."""
    with pytest.raises((SystemExit, UsageError)) as caught:
        parse(*arguments)
    if isinstance(caught.value, UsageError):
        return str(caught.value)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return unframed(output.err)


def unframed(text: str) -> str:
    """Return a text of tyro without its frames and line breaks."""
    return " ".join(re.sub("[│╭╮╰╯─]+|-{3,}", " ", text).split())
