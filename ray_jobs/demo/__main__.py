"""Run `demo` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.config.spec import DemoSpec
from ray_jobs.demo import job

if __name__ == "__main__":
    main(DemoSpec, job.demo, job.__doc__)
