"""Run `train` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.config.spec import RunSpec
from ray_jobs.train import job

if __name__ == "__main__":
    main(RunSpec, job.fit, job.__doc__, sections=("run", "data", "model", "train"))
