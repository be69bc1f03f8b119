"""What the doctor looks at, before a GPU is rented or an epoch is lost.

    finding.py      what a check found, and what mends it
    here.py         without a cluster: data, weights, size of the working directory
    probe.py        what only a node can know of itself, asked of all nodes at once
    nodes.py        versions, clocks, shared memory, GPUs
    reach.py        storage, data and weights, seen from every node
    fit.py          workers and budgets against what the cluster has, or may have
    collective.py   two workers exchange an array

Importing them imports neither Ray nor TensorFlow.
"""
