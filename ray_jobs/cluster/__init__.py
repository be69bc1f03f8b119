"""Connects to Ray, computes its capacity and starts groups of TensorFlow workers.

connection.py        connect to a cluster, or start a local Ray
node_inventory.py    resources of the nodes: total, free, possible
capacity.py          how many workers, trials and reading tasks fit
capacity_request.py  what a job requests from an autoscaler
packaging.py         the working directory and environment of a submitted job
worker_group.py      addresses, environment and strategy of TensorFlow workers
tf_backend.py        the same for Ray Train: KerasTrainer
strategy.py          replicas of a worker and their exchanges (imports TensorFlow)
hang_watchdog.py     ends a worker that hangs
environment.py       environment.json of a run
stderr_filter.py     drops log lines of native libraries
compat_ray.py        all private APIs of Ray
"""
