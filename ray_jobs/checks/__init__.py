"""Checks for problems that would stop or spoil a job, before a GPU is rented or an epoch is lost.

Input: a spec, and its manifest if there is one. Output: findings, each with a remedy.

finding.py         result of a check
column_drift.py    how the values of a column differ from those of the training rows
local.py           without a cluster: weights, size of the uploaded folder
probe.py           runs functions on all nodes at the same time
node_health.py     versions, clocks, shared memory and GPUs of the nodes
storage_access.py  storage, data and weights as seen from every node
resources.py       compares workers and memory budgets with what the cluster has or may add
collective.py      two workers exchange an array
preflight.py       the checks that `train` and `tune` run themselves

Importing them imports neither Ray nor TensorFlow.
"""
