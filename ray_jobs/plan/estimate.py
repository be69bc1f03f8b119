"""Estimates memory, step time, traffic, feed, wall time and cost of a run.

Input: settings, a machine and the costs of the model's layers. Output: a `Plan`.

Time of a layer (roofline model; Williams et al. 2009, doi 10.1145/1498765.1498785):

    forward_s(b rows) = max(b × flops / (peak × flops_efficiency),
                            (b × moved_bytes + weight_bytes) / (bandwidth × bandwidth_efficiency),
                            layer_us)

A layer with a gradient takes three times as long: once forward and twice backward, for the
gradients of its inputs and of its weights (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). The
update reads and writes weights, gradients and optimizer state once, and starts one operation per
variable.

    step_s = parts × Σ layers + update_s + exchange_s      or the feed's time if that is longer

Only the feed overlaps with computation: gradients are summed once all of them are computed. On
machines without GPUs, the feed uses the cores that compute, so its time is added.

Ring all-reduce of S bytes over n replicas: 2 (n - 1) / n × S / bandwidth + 2 (n - 1) × latency
(Patarasuk and Yuan 2009, doi 10.1016/j.jpdc.2008.09.002). The slowest link counts: within one
machine its own link, otherwise the network, which a ring uses once per machine.

Scaling efficiency is that of strong scaling, since the global batch is constant: the time of the
whole batch on one replica with enough memory, divided by n times the step.

Memory of a replica: weights, gradients (twice with `accumulate_steps`, plus a packed copy if they
are exchanged), optimizer state, outputs of all layers with a gradient for the rows of a part, twice
the largest output for gradients in flight, and prefetched batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import computed_field

from mm_model.spec import Spec
from ray_jobs.cluster.capacity import bundles_that_fit, worker_resources
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.data.cache import choose_cache
from ray_jobs.data.manifest import Manifest
from ray_jobs.plan.layer_costs import LayerCost, ModelCosts
from ray_jobs.plan.plan_spec import MachineSpec

GIB, MIB = 2.0**30, 2.0**20

_BACKWARD = 2
_FLOAT_BYTES = 4
_EXCHANGES_PER_NORM = 4
"""Exchanges per synchronized batch norm: the mean, then mean and variance, and the gradients of
both."""
_STARTUP_S = 40.0
"""Time from the command to the first step; `python -m benchmarks.startup` measured 31 to 42 s. An
autoscaler needs further minutes to start machines."""

# Seconds of one core per pixel, measured by `python -m benchmarks.feed` (docs/experiments.md) on
# two cores, with JPEGs of 320 px, and with raw and cached pixels of 224 px.
_JPEG_S = 2 / 4298 / 320**2
_RAW_S = 2 / 18039 / 224**2
_CACHED_S = 2 / 27010 / 224**2

_LOW_EFFICIENCY = 0.5
_WITHOUT_XLA = "2.6 to 3.5"
"""Measured for EfficientNet-B0 at 224 px with 64 and 128 rows (docs/experiments.md)."""


class MemoryPlan(Spec):
    """Memory of one replica, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    batches: float
    reserved: float
    capacity: float
    """Memory that is available to the replica."""

    @computed_field
    @property
    def total(self) -> float:
        """Memory that the replica needs."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations)
        return sum(parts) + self.batches + self.reserved

    @property
    def fits(self) -> bool:
        """Whether the replica needs no more memory than is available."""
        return self.total <= self.capacity


class StagePlan(Spec):
    """One stage of a run; without `train.stages`, the run is a single stage."""

    epochs: int
    steps: int
    num_learning: int
    """Number of trainable weights."""
    memory: MemoryPlan
    compute_s: float
    """Time of the forward pass, backward pass and update of a step."""
    exchange_s: float
    exchange_bytes: float
    """Bytes that each replica sends per step."""
    feed_s: float
    """Time that a worker's cores need to prepare the rows of a step, after the first epoch."""
    step_s: float
    rows_per_s: float
    """Rows per second of all workers together."""
    feed_cores: float
    """Cores that each worker's feed needs in the first epoch, before anything is cached."""
    efficiency: float
    """Scaling efficiency; 1 is ideal."""
    seconds: float
    """Duration, including validation."""


class Plan(Spec):
    """The estimates for a run."""

    gpu: str
    instance: str
    num_workers: int
    num_replicas: int
    num_machines: int
    rows_per_replica: int
    """Rows of a replica per step."""
    accumulate_steps: int
    precision: str
    num_weights: int
    forward_flops: float
    """Operations of the forward pass per row."""
    num_rows: int
    """Rows of the training split."""
    stages: tuple[StagePlan, ...]
    startup_s: float
    wall_s: float
    """Duration of all epochs; `train.patience` may end the run sooner."""
    usd: dict[str, float]
    """Cost of the workers' machines, by kind of price."""
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether each replica has enough memory."""
        return all(stage.memory.fits for stage in self.stages)

    @property
    def peak_memory(self) -> MemoryPlan:
        """Memory in the stage that needs the most memory."""
        return max((stage.memory for stage in self.stages), key=lambda memory: memory.total)


@dataclass(frozen=True)
class Estimator:
    """Estimates a run on a kind of machine, given the costs of the model in each stage."""

    spec: RunSpec
    gpu: str
    machine: MachineSpec
    costs: Sequence[ModelCosts]
    manifest: Manifest

    def plan(self) -> Plan:
        """Return the estimates.

        Raises:
            JobError: If no worker fits on a machine, or the training split has fewer rows than a
                step.
        """
        train = self.spec.train
        num_workers = train.workers_range[1]
        num_machines = -(-num_workers // self.workers_per_machine)
        num_rows = self.manifest.splits["train"].num_rows
        if num_rows < train.global_batch_size:
            raise JobError(
                f"train.global_batch_size={train.global_batch_size} exceeds the {num_rows} rows of "
                "the training split; lower it"
            )
        stages, epochs = [], 0
        for costs in self.costs:
            stages.append(self._stage(costs, epochs))
            epochs += costs.epochs
        wall_s = _STARTUP_S + sum(stage.seconds for stage in stages)
        prices = self.machine.usd_per_hour
        return Plan(
            gpu=self.gpu,
            instance=self.machine.instance,
            num_workers=num_workers,
            num_replicas=self._replicas,
            num_machines=num_machines,
            rows_per_replica=self._rows,
            accumulate_steps=train.accumulate_steps,
            precision=train.precision,
            num_weights=self.costs[0].num_weights,
            forward_flops=sum(layer.flops for layer in self.costs[0].layers),
            num_rows=num_rows,
            stages=tuple(stages),
            startup_s=_STARTUP_S,
            wall_s=wall_s,
            usd={kind: wall_s / 3600 * num_machines * price for kind, price in prices.items()},
            warnings=tuple(self._warnings(stages)),
        )

    @property
    def workers_per_machine(self) -> int:
        """Number of workers that fit on a machine.

        Raises:
            JobError: If none fits.
        """
        has = {"GPU": self.machine.gpus, "CPU": self.machine.cpus}
        needs = worker_resources(self.spec.train)
        for name, amount in has.items():
            if needs.get(name, 0) > amount:
                raise JobError(
                    f"train.{name.lower()}s_per_worker={needs[name]:g} exceeds the {amount} "
                    f"{name}s of {self.machine.instance}; lower it or choose another --gpu"
                )
        return bundles_that_fit(has, {name: needs[name] for name in has if name in needs})

    @property
    def _replicas(self) -> int:
        train = self.spec.train
        return train.workers_range[1] * train.replicas_per_worker

    @property
    def _rows(self) -> int:
        """Rows of a replica per step."""
        return self.spec.train.global_batch_size // self._replicas

    def _stage(self, costs: ModelCosts, epochs_before: int) -> StagePlan:
        train, replicas, splits = self.spec.train, self._replicas, self.manifest.splits
        update_s = self._update_s(costs)
        parts = train.accumulate_steps
        compute_s = parts * self._layers_s(costs, self._rows // parts) + update_s
        alone_s = update_s + self._layers_s(costs, train.global_batch_size)
        width = 2 if train.all_reduce_dtype == "bfloat16" else _FLOAT_BYTES
        gradient_bytes = float(width * costs.num_learning)
        exchange_s = self._exchange_s(costs, gradient_bytes)
        worker_rows = self._rows * train.replicas_per_worker
        first_row_s, row_s = self._feed_row_s()
        feed_s = worker_rows * row_s / train.cpus_per_worker
        first_feed_s = worker_rows * first_row_s / train.cpus_per_worker
        step_s = self._with_feed(compute_s + exchange_s, feed_s)

        def steps_before(epoch: int) -> int:
            # Leftover rows open the next epoch.
            return epoch * splits["train"].num_rows // train.global_batch_size

        steps = steps_before(epochs_before + costs.epochs) - steps_before(epochs_before)
        first_steps = steps_before(1) if epochs_before == 0 else 0
        first_s = self._with_feed(compute_s + exchange_s, first_feed_s)
        seconds = (steps - first_steps) * step_s + first_steps * first_s
        batches = -(-splits["validation"].num_rows // train.global_batch_size)
        views = self.spec.model.image.inference_views
        validation_s = batches * views * self._layers_s(costs, self._rows, training=False)
        return StagePlan(
            epochs=costs.epochs,
            steps=steps,
            num_learning=costs.num_learning,
            memory=self._memory(costs, gradient_bytes if replicas > 1 else 0.0),
            compute_s=compute_s,
            exchange_s=exchange_s,
            exchange_bytes=2 * (replicas - 1) / replicas * gradient_bytes,
            feed_s=feed_s,
            step_s=step_s,
            rows_per_s=train.global_batch_size / step_s,
            feed_cores=worker_rows * first_row_s / (compute_s + exchange_s),
            efficiency=alone_s / (replicas * step_s),
            seconds=seconds + costs.epochs * validation_s,
        )

    def _memory(self, costs: ModelCosts, packed_bytes: float) -> MemoryPlan:
        train, machine = self.spec.train, self.machine
        part = self._rows // train.accumulate_steps
        kept = sum(layer.kept_bytes for layer in costs.layers if layer.learns)
        largest = max(layer.kept_bytes for layer in costs.layers)
        copies = 1 + (train.accumulate_steps > 1)
        graph = sum(1 + _BACKWARD * layer.learns for layer in costs.layers) / (1 + _BACKWARD)
        sharing = 1 if machine.gpus else self.workers_per_machine
        return MemoryPlan(
            weights=float(_FLOAT_BYTES * costs.num_weights),
            gradients=copies * float(_FLOAT_BYTES * costs.num_learning) + packed_bytes,
            optimizer=_FLOAT_BYTES * costs.num_slots,
            activations=part * (kept + 2 * largest),
            batches=self._rows * costs.input_bytes * (self.spec.data.prefetch_batches + 2),
            reserved=machine.reserved_gib * GIB + graph * machine.layer_mib * MIB,
            capacity=machine.memory_gib * GIB / sharing,
        )

    def _layers_s(self, costs: ModelCosts, rows: int, training: bool = True) -> float:
        flops, bandwidth = self._rates()
        least_s = self.machine.layer_us * 1e-6

        def forward_s(layer: LayerCost) -> float:
            moved = rows * layer.moved_bytes + layer.weight_bytes
            return max(rows * layer.flops / flops, moved / bandwidth, least_s)

        return sum(
            forward_s(layer) * (1 + _BACKWARD * (training and layer.learns))
            for layer in costs.layers
        )

    def _update_s(self, costs: ModelCosts) -> float:
        _, bandwidth = self._rates()
        # Weights, gradients and the optimizer state of the weights that learn in this stage.
        moved = 2 * _FLOAT_BYTES * (2 * costs.num_learning + costs.num_slots)
        return moved / bandwidth + costs.num_variables * self.machine.layer_us * 1e-6

    def _rates(self) -> tuple[float, float]:
        """Return the operations and bytes per second of a replica."""
        machine, train = self.machine, self.spec.train
        units = 1.0 if machine.gpus else train.cpus_per_worker
        flops = units * machine.peak_flops(train.precision) * machine.flops_efficiency
        return flops, units * machine.bandwidth_gb_s * 1e9 * machine.bandwidth_efficiency

    def _exchange_s(self, costs: ModelCosts, gradient_bytes: float) -> float:
        train, machine, replicas = self.spec.train, self.machine, self._replicas
        network = machine.network_gbit_s / 8
        link = machine.link_gb_s or network
        one_machine = train.workers_range[1] <= self.workers_per_machine
        slowest = link if one_machine else min(link, network)
        gradient_s = ring_s(gradient_bytes, replicas, slowest, machine.latency_us)
        norms = costs.sync_norms * _EXCHANGES_PER_NORM * train.accumulate_steps
        return gradient_s + norms * ring_s(0.0, replicas, slowest, machine.latency_us)

    def _feed_row_s(self) -> tuple[float, float]:
        """Return the core seconds per row, in the first epoch and in later ones."""
        image, data = self.manifest.image, self.spec.data
        if image.features or self.spec.model.image.kind == "none":
            return 0.0, 0.0
        images = len(image.columns)
        size = data.image_size or max(image.height, image.width)
        fed_px = images * size**2
        decode_s = _RAW_S * fed_px
        if image.encoding == "jpeg":
            decode_s = _JPEG_S * images * image.height * image.width
        row_bytes = 3 * fed_px
        if choose_cache(data, self.manifest, row_bytes, float("inf")) == "none":
            return decode_s, decode_s
        num_rows = sum(self.manifest.splits[s].num_rows for s in ("train", "validation"))
        cached = min(1.0, data.cache_bytes / (num_rows * row_bytes))
        return decode_s, cached * _CACHED_S * fed_px + (1 - cached) * decode_s

    def _with_feed(self, step_s: float, feed_s: float) -> float:
        return max(step_s, feed_s) if self.machine.gpus else step_s + feed_s

    def _warnings(self, stages: Sequence[StagePlan]) -> list[str]:
        train, machine, warnings = self.spec.train, self.machine, []
        cores = max(stage.feed_cores for stage in stages)
        if machine.gpus and cores > train.cpus_per_worker:
            available = machine.cpus / self.workers_per_machine
            enough = -(-cores // 1)
            text = (
                f"train.cpus_per_worker={train.cpus_per_worker:g} is too low: until rows are "
                f"cached, each worker's feed needs {cores:.1f} cores; "
            )
            if enough <= available - 1:
                text += f"set it to {enough:g}"
            else:
                text += (
                    f"{machine.instance} has {available:g} per worker, so prepare images at the "
                    "model's input size or with prepare.store=raw, or add nodes without GPUs "
                    "(data.decode=workers)"
                )
            warnings.append(text)
        efficiency = min(stage.efficiency for stage in stages)
        fewer = [n for n in train.allowed_workers() if n < train.workers_range[1]]
        if efficiency < _LOW_EFFICIENCY and fewer:
            warnings.append(
                f"scaling efficiency is only {efficiency:.0%}; increase train.global_batch_size or "
                f"use fewer workers ({', '.join(map(str, fewer))})"
            )
        if machine.gpus and not train.jit_compile:
            warnings.append(
                "step times assume XLA (train.jit_compile=true); without it, steps on an H100 "
                f"took {_WITHOUT_XLA} times as long"
            )
        return warnings


def ring_s(num_bytes: float, replicas: int, gb_s: float, latency_us: float) -> float:
    """Return the seconds of a ring all-reduce.

    Args:
        num_bytes: Bytes to reduce per replica.
        replicas: Number of replicas in the ring.
        gb_s: Bandwidth of the slowest link in each direction, in 10^9 bytes per second.
        latency_us: Latency of a message, in microseconds.
    """
    messages = 2 * (replicas - 1)
    return messages / replicas * num_bytes / (gb_s * 1e9) + messages * latency_us * 1e-6
