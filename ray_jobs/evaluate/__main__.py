"""Run `evaluate` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.config.inference_spec import EvaluateSpec
from ray_jobs.evaluate import job

if __name__ == "__main__":
    main(EvaluateSpec, job.evaluate, job.__doc__)
