"""Searches for the best settings: many trials → the best run.

Input: a spec with a `tune` section, and prepared data. Output: a search folder with the trials, the
leaderboard, tune.html, best.yaml and the run folder of the best trial.

job.py          the entrance: checks, connects to Ray, runs the search
run_trials.py   runs or resumes the trials under Ray Tune
search/         what is tried
trials/         how it is trained
results/        leaderboard, report page and the best run
"""

from ray_jobs.tune.job import search

__all__ = ["search"]
