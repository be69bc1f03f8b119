"""Estimates memory, time and cost of a run before you rent machines.

Input: a specification, a machine of gpus.yaml and optionally a manifest. Output: a `Plan`.

plan_spec.py    settings of `plan`; the table of machines
layer_costs.py  builds the model → operations, traffic and memory per layer
estimate.py     layers + machine + settings → memory, time, network, feed, cost
suggestions.py  settings that fit in memory if the given ones do not
job.py          runs them and prints the tables
"""

from ray_jobs.plan.job import plan

__all__ = ["plan"]
