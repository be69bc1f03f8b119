"""Requests resources from an autoscaler for as long as a job needs them."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Self
from uuid import uuid4

from ray_jobs.cluster import compat_ray
from ray_jobs.cluster.connection import owns_ray

_RENEWAL_S = 20.0
_EXPIRY_S = 60.0
"""Time after which Ray drops the request of a killed driver."""


class CapacityRequest:
    """A request that lasts until the block ends, and adds to those of other jobs.

    An autoscaler compares the sum of all requests with the resources of all nodes, whether they are
    free or not. Therefore, each job must also request what it already uses.
    """

    def __init__(self) -> None:
        self._requester = f"ray-jobs-{uuid4().hex}"
        self._bundles: list[dict[str, float]] = []
        self._lock, self._closed = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._renew, name="capacity-request", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closed.set()
        self.update([])

    def update(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Request these bundles instead of the previous ones.

        Args:
            bundles: Resources that must each fit on one node.
        """
        with self._lock:
            if self._bundles != list(bundles):
                self._bundles = [dict(bundle) for bundle in bundles]
                self._send()

    def _renew(self) -> None:
        while not self._closed.wait(_RENEWAL_S):
            with self._lock:
                if self._bundles:
                    self._send()

    def _send(self) -> None:
        from ray.exceptions import RayError

        if owns_ray():
            return  # A local Ray has no autoscaler.
        # The next renewal repeats a lost request; after a lost withdrawal, the request expires.
        with suppress(RayError):
            if self._bundles:
                compat_ray.request_capacity(self._requester, self._bundles, _EXPIRY_S)
            else:
                compat_ray.withdraw_capacity(self._requester)
