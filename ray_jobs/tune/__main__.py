"""Run `tune` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.config.spec import RunSpec
from ray_jobs.tune import job

if __name__ == "__main__":
    main(RunSpec, job.search, job.__doc__)
