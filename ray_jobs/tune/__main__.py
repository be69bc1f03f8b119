"""Run `tune` from the command line."""

from ray_jobs.config.command_line import main
from ray_jobs.tune import job
from ray_jobs.tune.search.space import SearchSpec

if __name__ == "__main__":
    main(SearchSpec, job.search, job.__doc__, sections=("run", "data", "model", "train", "tune"))
