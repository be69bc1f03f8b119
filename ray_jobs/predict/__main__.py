"""Run `predict` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.config.inference_spec import PredictSpec
from ray_jobs.predict import job

if __name__ == "__main__":
    main(PredictSpec, job.predict, job.__doc__)
