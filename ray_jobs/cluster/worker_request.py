"""Requests nodes from an autoscaler for the workers that a run could have but lacks."""

import threading
from contextlib import suppress
from typing import Any, Self
from uuid import uuid4

from ray_jobs.cluster import compat_ray
from ray_jobs.cluster.capacity import allowed_worker_counts, worker_resources
from ray_jobs.cluster.connection import owns_ray
from ray_jobs.config.spec import TrainSpec

_RENEWAL_S = 20.0
_EXPIRY_S = 60.0
"""Time after which Ray drops the request of a killed driver."""


class WorkerRequest:
    """A request that lasts until the block ends; only runs with a range of workers need one.

    Ray Train requests the workers of an attempt itself, so this requests only the others.

    Args:
        train: The `train` section.
    """

    def __init__(self, train: TrainSpec) -> None:
        allowed = allowed_worker_counts(train)
        self._max_workers, self._bundle = allowed[-1], worker_resources(train)
        self._is_needed = len(allowed) > 1 and not owns_ray()
        self._requester, self._missing = f"ray-jobs-{uuid4().hex}", 0
        self._lock, self._closed = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        if self._is_needed:
            threading.Thread(target=self._renew, name="worker-request", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        self.update(self._max_workers)

    def update(self, num_workers: int) -> None:
        """Request the workers that a run lacks if an attempt has, or is to have, `num_workers`."""
        with self._lock:
            self._missing = self._max_workers - num_workers
            self._send()

    def _renew(self) -> None:
        while not self._closed.wait(_RENEWAL_S):
            with self._lock:
                self._send()

    def _send(self) -> None:
        from ray.exceptions import RayError

        if not self._is_needed:
            return
        bundles = [self._bundle] * self._missing
        # The next renewal repeats a request that was lost.
        with suppress(RayError):
            if bundles and not self._closed.is_set():
                compat_ray.request_capacity(self._requester, bundles, _EXPIRY_S)
            else:
                compat_ray.withdraw_capacity(self._requester)
