"""Settings of what is said to a cluster's job server. Imports no Ray."""

from typing import ClassVar

from pydantic import field_validator

from mm_model.spec import Spec

DEFAULT = "http://127.0.0.1:8265"


def is_url(text: str) -> bool:
    """Whether a text can be that of a dashboard."""
    return text.startswith(("http://", "https://"))


class ServerSpec(Spec):
    """The cluster that has the jobs."""

    address: str | None = None
    """URL of the cluster's dashboard; by default $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS where that
    is a URL, else http://127.0.0.1:8265."""

    @field_validator("address")
    @classmethod
    def _is_url(cls, value: str | None) -> str | None:
        if value is not None and not is_url(value):
            raise ValueError(f"is the URL of a dashboard, such as {DEFAULT}")
        return value


class SubmitSpec(ServerSpec):
    """How a job is sent."""

    wait: bool = True
    """Follow the job until it ends. `--no-wait` says the same as `--wait false`: print the job's id
    alone, and leave it to the cluster."""
    submission_id: str | None = None
    """Name of the job at the cluster; by default Ray makes one."""
    working_dir: str | None = None
    """Folder that goes with the job, less what its runtime_env.yaml and .gitignore leave out; by
    default the project's."""
    env: tuple[str, ...] = ()
    """Environment variables that the job is to have as they are here, by name, such as
    AWS_ACCESS_KEY_ID,AWS_SECRET_ACCESS_KEY. No others go with it, since whoever may ask the cluster
    for its jobs can read them."""


class JobSpec(ServerSpec):
    """One job at the cluster."""

    POSITIONAL: ClassVar[str] = "id"

    id: str
    """Submission id of the job, as `list` shows it."""


class FetchSpec(JobSpec):
    """One job at the cluster, whose summary is read there."""

    working_dir: str | None = None
    """Folder that goes along with what reads it; by default the project's."""
