"""What the doctor looks at, before a GPU is rented or an epoch is lost.

    finding.py      what a check found, and what mends it
    here.py         without a cluster: weights, size of the folder that goes with a job
    probe.py        what only a node can know of itself, asked of all nodes at once
    nodes.py        versions, clocks, shared memory, GPUs
    reach.py        storage, data and weights, seen from every node
    fit.py          workers and budgets against what the cluster has, or may have
    collective.py   two workers exchange an array
    preflight.py    those of them that `train` and `tune` make by themselves

Importing them imports neither Ray nor TensorFlow.
"""
