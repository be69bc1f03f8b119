"""Run `export` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.config.inference_spec import ExportSpec
from ray_jobs.export import job

if __name__ == "__main__":
    main(ExportSpec, job.export, job.__doc__)
