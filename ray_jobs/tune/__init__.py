"""Searches for the best hyperparameters: many trials → the best run.

Input: a spec with a `tune` section, and prepared data. Output: a search folder with the trials, the
leaderboard, tune.html, best.yaml and the run folder of the best trial.

job.py          entry point: checks the spec, connects to Ray, runs the search
run_trials.py   runs or resumes the trials under Ray Tune
search/         chooses the values of each trial
trials/         trains the trials
results/        writes the leaderboard and the report page, trains the best run
"""

from ray_jobs.tune.job import search

__all__ = ["search"]
