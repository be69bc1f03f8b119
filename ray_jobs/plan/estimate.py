"""Layers, machine and settings → memory, step time, network, feed, wall time and cost.

Time of a layer: what takes longest of its float operations, its traffic to memory, and being
started at all (the roofline of Williams et al. 2009, doi 10.1145/1498765.1498785, by layer):

    forward_s(b rows) = max(b × flops / (peak × flops_efficiency),
                            (b × moved_bytes + weight_bytes) / (bandwidth × bandwidth_efficiency),
                            layer_us)

A layer that learns, or lies above one that does, takes it three times: once forward and twice
backward, for the gradients of its inputs and of its weights (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1). A layer below all that learns takes it once. The update reads and writes weights,
gradients and the optimizer's numbers once, and starts one operation's worth for each variable.

    step_s = parts × Σ layers + update_s + exchange_s      or the feed's time, if that is longer

Nothing overlaps but the feed: `step.py` sums gradients when all of them are there. Where cores
compute in place of GPUs, the feed needs the same cores and its time is added.

Ring all-reduce of S bytes between n replicas: 2 (n - 1) / n × S / bandwidth + 2 (n - 1) × latency
(Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002). The slowest link counts: of one machine
its own, of several the network, each machine's once, whatever its number of GPUs.

Scaling efficiency is strong scaling, since the global batch stays as it is: the time of the whole
batch on one replica that had the memory for it, over n times the step.

Memory of a replica: weights, gradients (twice with `accumulate_steps`, and once more packed where
they are exchanged), the optimizer's numbers, the outputs of all layers that a gradient goes through
for the rows of a part, the largest of them twice again for gradients on their way, and batches made
ready.
"""

from collections.abc import Sequence

from pydantic import computed_field

from mm_model.spec import Spec
from ray_jobs.cluster.capacity import worker_resources
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.cache import choose_kind
from ray_jobs.data.manifest import Manifest
from ray_jobs.plan.layer_costs import LayerCost, ModelCosts
from ray_jobs.plan.plan_spec import MachineSpec

GIB, MIB = 2.0**30, 2.0**20

_BACKWARD = 2
_FLOAT_BYTES = 4
_EXCHANGES_PER_NORM = 4
"""Of a synchronised batch norm: mean, then mean and variance, and their gradients."""
_STARTUP_S = 40.0
"""From `train` to the first step: `python -m benchmarks.startup` measured 31 to 42 s. Machines that
an autoscaler still has to start take minutes more."""

# Seconds of one core for a pixel, by `python -m benchmarks.feed` (EXPERIMENTS.md): JPEGs of 320 px,
# raw pixels and cached ones of 224 px, on two cores.
_JPEG_S = 2 / 4298 / 320**2
_RAW_S = 2 / 18039 / 224**2
_CACHED_S = 2 / 27010 / 224**2

_LOW_EFFICIENCY = 0.5
_WITHOUT_XLA = "2.6 to 3.5"
"""For EfficientNet-B0 at 224 px, 64 and 128 rows: all that was looked at (EXPERIMENTS.md)."""


class MemoryPlan(Spec):
    """Bytes of one replica."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    batches: float
    reserved: float
    capacity: float
    """What it has."""

    @computed_field
    @property
    def total(self) -> float:
        """All that it needs."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.batches + self.reserved

    @property
    def fits(self) -> bool:
        """Whether it has what it needs."""
        return self.total <= self.capacity


class StagePlan(Spec):
    """A stage of the training; one where there are no stages."""

    epochs: int
    steps: int
    num_learning: int
    """Weights that learn."""
    memory: MemoryPlan
    compute_s: float
    """Of a step: forward, backward and update."""
    exchange_s: float
    exchange_bytes: float
    """What each replica sends in a step."""
    feed_s: float
    """In which a worker's cores make the rows of a step ready, after the first epoch."""
    step_s: float
    rows_per_s: float
    """Of all workers."""
    feed_cores: float
    """Cores that each worker's feed would keep busy in the first epoch, when nothing is cached."""
    efficiency: float
    """Of scaling, 1 at best."""
    seconds: float
    """With validation."""


class Plan(Spec):
    """What a run will take, as far as it can be told beforehand."""

    gpu: str
    instance: str
    num_workers: int
    num_replicas: int
    num_machines: int
    rows_per_replica: int
    """Of a step."""
    accumulate_steps: int
    precision: str
    num_weights: int
    forward_flops: float
    """Of a row."""
    num_rows: int
    """Of the training split."""
    stages: tuple[StagePlan, ...]
    startup_s: float
    wall_s: float
    """If every epoch is trained; `train.patience` may end it sooner."""
    usd: dict[str, float]
    """Of the workers' machines, by the kind of price."""
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether no replica runs out of memory."""
        return all(stage.memory.fits for stage in self.stages)

    @property
    def fullest(self) -> MemoryPlan:
        """Memory in the stage that needs the most."""
        return max((stage.memory for stage in self.stages), key=lambda memory: memory.total)


class Estimator:
    """Knows the model and the machine, and what settings make of them.

    Args:
        gpu: name of the machine's kind.
        machine: that the workers run on.
        costs: of the model, by stage.
        manifest: of the data.
    """

    def __init__(
        self, gpu: str, machine: MachineSpec, costs: Sequence[ModelCosts], manifest: Manifest
    ) -> None:
        self.gpu, self.machine, self.costs, self.manifest = gpu, machine, costs, manifest

    def plan(self, spec: RunSpec) -> Plan:
        """Return what a run takes.

        Raises:
            JobError: if no worker fits on a machine, or there are too few rows for a step.
        """
        train = spec.train
        num_workers = train.workers_range[1]
        replicas = num_workers * train.replicas_per_worker
        num_machines = -(-num_workers // workers_per_machine(self.machine, spec))
        num_rows = self.manifest.splits["train"].num_rows
        if num_rows < train.global_batch_size:
            raise JobError(
                f"train.global_batch_size={train.global_batch_size} is more than the {num_rows} "
                "rows of the training split; lower it"
            )
        stages = []
        done = 0
        for costs in self.costs:
            stages.append(self._stage(spec, costs, done))
            done += costs.epochs
        wall_s = _STARTUP_S + sum(stage.seconds for stage in stages)
        prices = self.machine.usd_per_hour
        return Plan(
            gpu=self.gpu,
            instance=self.machine.instance,
            num_workers=num_workers,
            num_replicas=replicas,
            num_machines=num_machines,
            rows_per_replica=train.global_batch_size // replicas,
            accumulate_steps=train.accumulate_steps,
            precision=train.precision,
            num_weights=self.costs[0].num_weights,
            forward_flops=sum(layer.flops for layer in self.costs[0].layers),
            num_rows=num_rows,
            stages=tuple(stages),
            startup_s=_STARTUP_S,
            wall_s=wall_s,
            usd={kind: wall_s / 3600 * num_machines * price for kind, price in prices.items()},
            warnings=tuple(self._warnings(spec, stages)),
        )

    def _stage(self, spec: RunSpec, costs: ModelCosts, epochs_before: int) -> StagePlan:
        train = spec.train
        replicas = train.workers_range[1] * train.replicas_per_worker
        rows = train.global_batch_size // replicas
        part = rows // train.accumulate_steps
        update_s = self._update_s(spec, costs)
        parts_s = train.accumulate_steps * self._layers_s(spec, costs.layers, part, training=True)
        compute_s = parts_s + update_s
        exchange_bytes = self._exchange_bytes(spec, costs)
        exchange_s = self._exchange_s(spec, costs, exchange_bytes)
        first_row_s, row_s = self._feed_row_s(spec)
        rows_of_worker = rows * train.replicas_per_worker
        first_feed_s, feed_s = (
            rows_of_worker * s / train.cpus_per_worker for s in (first_row_s, row_s)
        )
        step_s = self._with_feed(compute_s + exchange_s, feed_s)
        first_s = self._with_feed(compute_s + exchange_s, first_feed_s)
        alone_s = update_s + self._layers_s(
            spec, costs.layers, train.global_batch_size, training=True
        )
        num_rows = self.manifest.splits["train"].num_rows

        def steps_before(epoch: int) -> int:
            # As the rows left over at an epoch's end open the next one.
            return epoch * num_rows // train.global_batch_size

        steps = steps_before(epochs_before + costs.epochs) - steps_before(epochs_before)
        first_steps = steps_before(1) if epochs_before == 0 else 0
        validation_s = self._validation_s(spec, costs, rows)
        seconds = (steps - first_steps) * step_s + first_steps * first_s
        return StagePlan(
            epochs=costs.epochs,
            steps=steps,
            num_learning=costs.num_learning,
            memory=self.memory(spec, costs),
            compute_s=compute_s,
            exchange_s=exchange_s,
            exchange_bytes=2 * (replicas - 1) / replicas * exchange_bytes,
            feed_s=feed_s,
            step_s=step_s,
            rows_per_s=train.global_batch_size / step_s,
            feed_cores=rows_of_worker * first_row_s / (compute_s + exchange_s),
            efficiency=alone_s / (replicas * step_s),
            seconds=seconds + costs.epochs * validation_s,
        )

    # -- memory -----------------------------------------------------------------------------------

    def memory(self, spec: RunSpec, costs: ModelCosts) -> MemoryPlan:
        """Return what a replica needs in a stage, and what it has."""
        train, machine = spec.train, self.machine
        replicas = train.workers_range[1] * train.replicas_per_worker
        rows = train.global_batch_size // replicas
        part = rows // train.accumulate_steps
        kept = sum(layer.kept_bytes for layer in costs.layers if layer.learns)
        largest = max(layer.kept_bytes for layer in costs.layers)
        gradient = float(_FLOAT_BYTES * costs.num_learning)
        copies = 1 + (train.accumulate_steps > 1)
        graph = sum(1 + _BACKWARD * layer.learns for layer in costs.layers) / (1 + _BACKWARD)
        sharing = 1 if machine.gpus else workers_per_machine(machine, spec)
        return MemoryPlan(
            weights=float(_FLOAT_BYTES * costs.num_weights),
            gradients=copies * gradient
            + (self._exchange_bytes(spec, costs) if replicas > 1 else 0.0),
            optimizer=_FLOAT_BYTES * costs.num_slots,
            activations=part * (kept + 2 * largest),
            batches=rows * costs.input_bytes * (spec.data.prefetch_batches + 2),
            reserved=machine.reserved_gib * GIB + graph * machine.layer_mib * MIB,
            capacity=machine.memory_gib * GIB / sharing,
        )

    # -- time -------------------------------------------------------------------------------------

    def _layers_s(
        self, spec: RunSpec, layers: Sequence[LayerCost], rows: float, training: bool
    ) -> float:
        flops, bandwidth = self._rates(spec)
        least_s = self.machine.layer_us * 1e-6

        def forward_s(layer: LayerCost) -> float:
            moved = rows * layer.moved_bytes + layer.weight_bytes
            return max(rows * layer.flops / flops, moved / bandwidth, least_s)

        return sum(
            forward_s(layer) * (1 + _BACKWARD * (training and layer.learns)) for layer in layers
        )

    def _update_s(self, spec: RunSpec, costs: ModelCosts) -> float:
        _, bandwidth = self._rates(spec)
        # Weights and gradients, and the part of the optimizer's numbers that learns now.
        moved = 2 * _FLOAT_BYTES * (2 * costs.num_learning + costs.num_slots)
        return moved / bandwidth + costs.num_variables * self.machine.layer_us * 1e-6

    def _rates(self, spec: RunSpec) -> tuple[float, float]:
        """Return operations and bytes a second of a replica."""
        machine = self.machine
        units = 1.0 if machine.gpus else spec.train.cpus_per_worker
        flops = units * machine.peak_flops(spec.train.precision) * machine.flops_efficiency
        return flops, units * machine.bandwidth_gb_s * 1e9 * machine.bandwidth_efficiency

    def _validation_s(self, spec: RunSpec, costs: ModelCosts, rows: int) -> float:
        batches = -(-self.manifest.splits["validation"].num_rows // spec.train.global_batch_size)
        return batches * self._layers_s(spec, costs.layers, rows, training=False)

    # -- network ----------------------------------------------------------------------------------

    def _exchange_bytes(self, spec: RunSpec, costs: ModelCosts) -> float:
        """Return the bytes of a gradient as it is sent."""
        width = 2 if spec.train.all_reduce_dtype == "bfloat16" else _FLOAT_BYTES
        return float(width * costs.num_learning)

    def _exchange_s(self, spec: RunSpec, costs: ModelCosts, num_bytes: float) -> float:
        train, machine = spec.train, self.machine
        replicas = train.workers_range[1] * train.replicas_per_worker
        network = machine.network_gbit_s / 8
        link = machine.link_gb_s or network
        one_machine = train.workers_range[1] <= workers_per_machine(machine, spec)
        slowest = link if one_machine else min(link, network)
        gradient_s = ring_s(num_bytes, replicas, slowest, machine.latency_us)
        norms = costs.sync_norms * _EXCHANGES_PER_NORM * train.accumulate_steps
        return gradient_s + norms * ring_s(0.0, replicas, slowest, machine.latency_us)

    # -- feed -------------------------------------------------------------------------------------

    def _feed_row_s(self, spec: RunSpec) -> tuple[float, float]:
        """Return seconds of a core for a row, in the first epoch and in later ones."""
        image, data = self.manifest.image, spec.data
        if image.features or spec.model.image.kind == "none":
            return 0.0, 0.0
        images = len(image.columns)
        size = data.image_size or max(image.height, image.width)
        fed_px = images * size**2
        decode_s = _RAW_S * fed_px
        if image.encoding == "jpeg":
            decode_s = _JPEG_S * images * image.height * image.width
        row_bytes = 3 * fed_px
        if choose_kind(data, self.manifest, row_bytes, float("inf")) == "none":
            return decode_s, decode_s
        num_rows = sum(self.manifest.splits[s].num_rows for s in ("train", "validation"))
        cached = min(1.0, data.cache_bytes / (num_rows * row_bytes))
        return decode_s, cached * _CACHED_S * fed_px + (1 - cached) * decode_s

    def _with_feed(self, step_s: float, feed_s: float) -> float:
        return max(step_s, feed_s) if self.machine.gpus else step_s + feed_s

    # -- what deserves a look ---------------------------------------------------------------------

    def _warnings(self, spec: RunSpec, stages: Sequence[StagePlan]) -> list[str]:
        train, machine, found = spec.train, self.machine, []
        cores = max(stage.feed_cores for stage in stages)
        if machine.gpus and cores > train.cpus_per_worker:
            share = machine.cpus / workers_per_machine(machine, spec)
            enough = -(-cores // 1)
            text = (
                f"each worker's feed needs {cores:.1f} cores while nothing is cached, and has "
                f"train.cpus_per_worker={train.cpus_per_worker:g}; "
            )
            if enough <= share - 1:
                text += f"set it to {enough:g}"
            else:
                text += (
                    f"{machine.instance} has {share:g} for each worker: prepare images at the size "
                    "that the model takes or with prepare.store=raw, or add nodes without GPUs "
                    "(data.decode=workers)"
                )
            found.append(text)
        worst = min(stages, key=lambda stage: stage.efficiency)
        most = train.workers_range[1]
        fewer = [n for n in train.allowed_workers() if n < most]
        if worst.efficiency < _LOW_EFFICIENCY and fewer:
            found.append(
                f"scaling efficiency is {worst.efficiency:.0%}: a larger train.global_batch_size "
                f"or fewer workers ({', '.join(map(str, fewer))}) would make better use of them"
            )
        if machine.gpus and not train.jit_compile:
            found.append(
                "times are of steps that XLA compiles (train.jit_compile=true): without it an H100 "
                f"took {_WITHOUT_XLA} times as long as planned"
            )
        return found


def ring_s(num_bytes: float, replicas: int, gb_s: float, latency_us: float) -> float:
    """Return the seconds of a ring all-reduce.

    Args:
        num_bytes: that each replica has.
        replicas: in the ring.
        gb_s: 10^9 bytes a second of the slowest link, each way.
        latency_us: microseconds of a message.
    """
    messages = 2 * (replicas - 1)
    return messages / replicas * num_bytes / (gb_s * 1e9) + messages * latency_us * 1e-6


def workers_per_machine(machine: MachineSpec, spec: RunSpec) -> int:
    """Return how many workers a machine holds.

    Raises:
        JobError: if it holds none.
    """
    has = {"GPU": machine.gpus, "CPU": machine.cpus}
    needs = {name: worker_resources(spec.train).get(name, 0) for name in has}
    for name, amount in needs.items():
        if amount > has[name]:
            raise JobError(
                f"a worker takes {amount:g} {name}, and {machine.instance} has {has[name]:g}; "
                f"lower train.{name.lower()}s_per_worker or choose another --gpu"
            )
    return int(min(has[name] // amount for name, amount in needs.items() if amount))
