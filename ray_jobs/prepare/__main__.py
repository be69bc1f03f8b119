"""Run `prepare` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.config.spec import RunSpec
from ray_jobs.prepare import job

if __name__ == "__main__":
    main(RunSpec, job.prepare, job.__doc__, sections=("run", "prepare", "data"))
