"""Run `plan` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.plan import job
from ray_jobs.plan.plan_spec import PlanSpec

if __name__ == "__main__":
    main(PlanSpec, job.plan, job.__doc__, sections=("data", "model", "train"))
