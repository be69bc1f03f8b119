"""Run `inspect` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.config.spec import InspectSpec
from ray_jobs.inspect import job

if __name__ == "__main__":
    main(InspectSpec, job.inspect, job.__doc__)
