"""What `plan` reckons with, part by part.

spec.py        settings of the job, and what a kind of machine has
gpus.yaml      the kinds of machines, which users may edit
layers.py      the model, built → what each layer computes, moves and keeps
estimate.py    layers + machine + settings → memory, time, network, feed, cost
remedy.py      settings that fit, where those given do not
"""

from ray_jobs.plan.job import plan

__all__ = ["plan"]
