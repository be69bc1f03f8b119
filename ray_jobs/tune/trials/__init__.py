"""Runs the trials: their actors, their worker processes, and the events of Ray Tune.

trial.py               one trial after another in an actor of Ray Tune
trial_workers.py       the worker processes of a trial
trial_checkpoints.py   the checkpoints that Tune keeps in a trial's folder
tune_callback.py       updates the search on Tune's events, and ends it at its budget
atomic_filesystem.py   lets Tune write complete files only
"""
