"""The errors that a job ends with in one line on the terminal, without a traceback."""


class UsageError(ValueError):
    """The command line or the YAML is wrong; the text says where, and what would be right."""


class JobError(Exception):
    """The job cannot go on for a reason that its user can mend; the text says how."""


class Interrupted(JobError):
    """The user stopped the job; the text says how it goes on."""
