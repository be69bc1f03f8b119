"""Which kind of source a specification names."""

from ray_jobs.spec import PrepareSpec


def detect_kind(spec: PrepareSpec) -> str:
    """Return the kind of source."""
    return "folder"
