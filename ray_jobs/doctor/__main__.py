"""Run `doctor` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.doctor import job

if __name__ == "__main__":
    main(job.DoctorSpec, job.examine, job.__doc__, sections=("run", "data", "train"))
