"""The processes of a trial: they start once, and train one trial after another.

Imports, TensorFlow's start and the strategy are paid for once a process; a trial pays for its model
and its graph. The first member lives in the trial's own process, the others in actors inside the
trial's placement group: whatever ends the trial ends them.
"""

import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from ray_jobs.cluster.capacity import actor_in_bundle, worker_resources
from ray_jobs.cluster.tf_backend import free_address, set_environment
from ray_jobs.cluster.watchdog import Watchdog
from ray_jobs.config.spec import RunSpec, TrainSpec
from ray_jobs.train.callbacks import Callbacks

if TYPE_CHECKING:
    from ray_jobs.train.checkpoints.checkpoint import Checkpoint, LoopState

_OTHERS_END_S = 10.0
"""An error of all members reaches the first one by itself in this time; else it waits for ever."""
_INFERENCE_CALLS = 5
_MOST_LOOPS = 8
_MOST_PARAMETERS = 10_000_000
"""Of all earlier trials' models whose graphs are kept."""


@dataclass(frozen=True)
class EpochResult:
    """How a trial stands after an epoch."""

    record: dict[str, Any]
    """Of the epoch; keys of `ray_jobs.train.telemetry.console`."""
    state: "LoopState"
    finished: bool
    """Whether the trial has come to its own end."""
    build_s: float
    """Seconds from the trial's begin to its built model; 0 in later epochs."""
    first_step_s: float
    """Seconds of its first step, in which the graph is made; 0 in later epochs."""


class TrialWorker:
    """One process of a group.

    Args:
        rank: among the members.
        num_workers: of them.
    """

    def __init__(self, rank: int, num_workers: int) -> None:
        self.rank, self.num_workers = rank, num_workers
        self._ready = False
        self._strategy: Any = None
        self._loops: list[Any] = []
        """Of earlier trials, the latest last: their graphs may be another trial's, too."""
        self._loop: Any = None
        self._epochs: Any = None
        self._hooks = _Signs()
        self._build_s = self._hang_timeout_s = 0.0

    def address(self) -> str:
        """Return where this member can listen."""
        return free_address()

    def begin(
        self, spec: RunSpec, feeding: Mapping[str, Any], addresses: Sequence[str], saved: Any
    ) -> None:
        """Build the model of a trial; the first trial starts TensorFlow, too.

        Args:
            spec: of the trial.
            feeding: `decode`, `cache` and `index`, as of a run.
            addresses: of all members.
            saved: checkpoint to go on from, if any.
        """
        self.end()
        started = time.monotonic()
        if not self._ready:
            set_environment(addresses, self.rank)
        from ray_jobs.cluster.strategy import WorkerContext, make_strategy, set_devices
        from ray_jobs.data.manifest import read_manifest
        from ray_jobs.storage.folder import Folder
        from ray_jobs.train.loop import Loop

        train = spec.train
        if not self._ready:
            set_devices(train.cpus_per_worker, train.use_gpu, train.deterministic)
            # One for all trials: collectives of two would be taken for each other's.
            self._strategy = make_strategy(self.num_workers)
            self._ready = True
        manifest = read_manifest(Folder(spec.data.prepared))
        place = WorkerContext(self.rank, self.num_workers)
        self._loop = next((loop for loop in self._loops if loop.becomes(spec)), None)
        if self._loop is None:
            self._make_room()
            feed = _feeding(spec, manifest, feeding)
            self._loop = Loop(spec, manifest, place, self._strategy, feed, tunable=True)
        self._loops = [loop for loop in self._loops if loop is not self._loop] + [self._loop]
        self._hooks = _Signs()
        self._epochs = self._loop.epochs(self._hooks, saved)
        self._build_s = time.monotonic() - started
        self._hang_timeout_s = train.hang_timeout_s

    def epoch(self) -> EpochResult:
        """Train an epoch."""
        with closing(Watchdog(self._hang_timeout_s, _tell_hang)) as watchdog:
            self._hooks.watchdog = watchdog
            outcome = next(self._epochs)
        record = outcome.state.history[-1]
        build_s, self._build_s = self._build_s, 0.0
        return EpochResult(record, outcome.state, outcome.finished, build_s, self._hooks.take())

    def saved(self, state: "LoopState") -> "Checkpoint":
        """Return a checkpoint after the last epoch."""
        return self._loop.snapshots.take(state, {}, self._loop.best)

    def inference_row_s(self) -> float:
        """Return the seconds that the model takes for a row, of a batch like that of a step."""
        import numpy as np

        from ray_jobs.data.batch import INPUT_TYPES

        inputs = self._loop.model.network.input
        rows = self._loop.spec.train.global_batch_size // self.num_workers
        batch = {n: np.zeros((rows, *t.shape[1:]), INPUT_TYPES[n]) for n, t in inputs.items()}
        seconds = []
        for _ in range(_INFERENCE_CALLS + 1):
            started = time.monotonic()
            self._loop.evaluate_step(batch).numpy()
            seconds.append(time.monotonic() - started)
        # The first one traces.
        return median(seconds[1:]) / rows

    def end(self) -> None:
        """End the trial; its graph stays for others."""
        if self._loop is not None:
            self._epochs.close()
            self._epochs = self._loop = None

    def _make_room(self) -> None:
        """Let go of graphs of earlier trials, the oldest first, where they are many or large."""
        while self._loops and (
            len(self._loops) >= _MOST_LOOPS
            or sum(loop.model.count_params() for loop in self._loops) > _MOST_PARAMETERS
        ):
            del self._loops[0]
            gc.collect()


class TrialGroup:
    """All processes of a trial, seen from the first one, whose placement group is theirs, too.

    Args:
        told: takes what another one failed of, before this one ends since it waits for that.
    """

    def __init__(self, told: Callable[[Exception], None]) -> None:
        import ray

        self.told = told
        placement: Any = ray.util.get_current_placement_group()
        bundles = placement.bundle_specs if placement else [{}]
        self.first = TrialWorker(0, len(bundles))
        self.others = [
            actor_in_bundle(TrialWorker, placement, rank, rank, len(bundles))
            for rank in range(1, len(bundles))
        ]
        self.addresses: list[str] = []

    def begin(self, spec: RunSpec, feeding: Mapping[str, Any], saved: "Checkpoint | None") -> None:
        """Build the model of a trial on every member.

        Args:
            spec: of the trial.
            feeding: as of `TrialWorker.begin`.
            saved: checkpoint to go on from, if any.
        """
        import ray

        if not self.addresses:
            others = ray.get([member.address.remote() for member in self.others])
            self.addresses = [self.first.address(), *others]
        # The best epochs' models are for whoever writes.
        stripped = ray.put(replace(saved, best={})) if saved and self.others else None
        begun = [m.begin.remote(spec, feeding, self.addresses, stripped) for m in self.others]
        with _together(begun, self.told):
            self.first.begin(spec, feeding, self.addresses, saved)

    def epoch(self) -> EpochResult:
        """Train an epoch on every member, and return how the first one stands."""
        with _together([member.epoch.remote() for member in self.others], self.told):
            return self.first.epoch()

    def saved(self, state: "LoopState") -> "Checkpoint":
        """Return a checkpoint after the last epoch."""
        return self.first.saved(state)

    def end(self) -> None:
        """Let go of the trial's model on every member."""
        with _together([member.end.remote() for member in self.others], self.told):
            self.first.end()

    def close(self) -> None:
        """End the other processes."""
        import ray

        for member in self.others:
            ray.kill(member)
        self.others = []


class _Signs(Callbacks):
    """Gives signs of life, and measures the first step."""

    def __init__(self) -> None:
        self.watchdog: Watchdog | None = None
        self.began: float | None = None
        self.seconds: float | None = None

    def alive(self) -> None:
        if self.watchdog is not None:
            self.watchdog.alive()

    def before_step(self, step: int, num_steps: int) -> None:
        if self.began is None:
            self.began = time.monotonic()

    def after_step(self, step: int) -> None:
        self.alive()
        if self.seconds is None and self.began is not None:
            self.seconds = time.monotonic() - self.began

    def take(self) -> float:
        """Return its seconds, once."""
        seconds, self.seconds = self.seconds or 0.0, 0.0
        return seconds


def _tell_hang(silent_s: float) -> None:
    text = (
        f"nothing happened for {silent_s:.0f} s (train.hang_timeout_s): this trial's worker hangs"
    )
    print(text, file=sys.stderr, flush=True)


class BrokenGroupError(Exception):
    """Members do not stand alike any more; what broke them is the cause."""


@contextmanager
def _together(calls: Sequence[Any], told: Callable[[Exception], None]) -> Iterator[None]:
    """Do something while other members do the same, and raise what any of them raises.

    One that died leaves this one waiting in a collective, from which there is no way back: then the
    process ends, and the trial with it, to be started anew from its checkpoint.

    Raises:
        BrokenGroupError: if this one failed, and others wait for it.
    """
    if not calls:
        yield
        return
    import ray

    done = threading.Event()
    raised: list[Exception] = []

    def follow() -> None:
        try:
            ray.get(list(calls))
        except Exception as error:
            raised.append(error)
            if not done.wait(_OTHERS_END_S):
                print(f"another worker of this trial failed: {error}", file=sys.stderr, flush=True)
                try:
                    told(error)
                finally:
                    os._exit(1)

    follower = threading.Thread(target=follow, name="others", daemon=True)
    follower.start()
    try:
        yield
    except Exception as error:
        done.set()
        follower.join(_OTHERS_END_S)
        if follower.is_alive():
            raise BrokenGroupError(str(error)) from error
        raise
    done.set()
    follower.join()
    if raised:
        raise raised[0]


def member_resources(train: TrainSpec, gpus: float | None) -> dict[str, float]:
    """Return the Ray resources of one process of a trial.

    Args:
        train: of the trial.
        gpus: of each process, in place of whole ones.
    """
    resources = worker_resources(train)
    return {**resources, "GPU": gpus} if gpus is not None and train.use_gpu else resources


def _feeding(spec: RunSpec, manifest: Any, feeding: Mapping[str, Any]) -> Any:
    from ray_jobs.data.cache import open_cache
    from ray_jobs.data.loader import FeedOptions

    cache = open_cache(feeding["cache"], manifest, spec.data.image_size, feeding["index"])
    return FeedOptions(
        data=spec.data,
        decode=feeding["decode"],
        threads=max(math.ceil(spec.train.cpus_per_worker), 1),
        cache=cache,
    )
