"""Runs the verbs as jobs on a cluster.

Input: a verb with its arguments. Output: the job's log, exit status and summary.

    submit_spec.py   settings
    job.py           the job: checks the arguments, uploads the project, lists and stops jobs
    client.py        connection to the job server
    logs.py          follows a job to its end
    summary.py       reads the results, on the cluster
"""

from ray_jobs.submit.job import submit

__all__ = ["submit"]
