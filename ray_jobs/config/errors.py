"""Errors that a job prints as one line, without a traceback."""


class UsageError(ValueError):
    """The command line or the YAML is invalid; the message names the setting and the remedy."""


class JobError(Exception):
    """The job cannot continue for a reason that the user can fix; the message explains how."""


class EmptyTableError(JobError):
    """A table has neither rows nor columns."""


class Interrupted(JobError):
    """The user stopped the job; the message explains how to resume."""
