"""Run `cross_validate` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.config.spec import CrossValidateSpec
from ray_jobs.cross_validate import job

if __name__ == "__main__":
    main(
        CrossValidateSpec,
        job.cross_validate,
        job.__doc__,
        sections=("run", "data", "model", "train", "cv"),
    )
