"""Runs the trials: their actors, their worker processes, and the events of Ray Tune.

trial.py               trains one trial after another in an actor of Ray Tune
trial_workers.py       runs the worker processes of a trial
trial_checkpoints.py   finds and deletes the checkpoints in a trial's folder
tune_callback.py       updates the search on Tune's events, and ends it at its budget
atomic_filesystem.py   makes Tune write each file completely or not at all
"""
