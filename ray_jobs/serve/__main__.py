"""Run `serve` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.config.inference_spec import ServeSpec
from ray_jobs.serve import job

if __name__ == "__main__":
    main(ServeSpec, job.serve, job.__doc__)
