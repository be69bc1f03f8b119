"""Settings of `plan` and the table of machines; imports neither Ray nor TensorFlow."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mm_model.nearest_match import require_one_of
from mm_model.spec import NonNegative, Positive, Spec
from ray_jobs.config import command_line
from ray_jobs.config.errors import UsageError
from ray_jobs.config.spec import RunSpec
from ray_jobs.tune.search.space import SearchSpec

TABLE = Path(__file__).parent / "gpus.yaml"

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Precision = Literal["float32", "mixed_bfloat16", "mixed_float16"]


class MachineSpec(Spec):
    """A machine type with GPUs, or one that computes on its CPU cores."""

    instance: str
    """Name of the instance type."""
    gpus: NonNegativeInt = 1
    """GPUs per machine; 0 to compute on its CPU cores."""
    cpus: PositiveInt
    """Logical CPUs per machine."""
    memory_gib: Positive
    """Memory per GPU or, without GPUs, of the machine."""
    reserved_gib: NonNegative = 1.0
    """Memory that a replica needs before its first tensor: CUDA context and libraries, or the
    process itself."""
    layer_mib: NonNegative = 0.0
    """Memory for the graph of a layer; 0 with GPUs, because the graph is not in GPU memory."""
    tflops: dict[Precision, Positive]
    """Peak dense TFLOPS of a GPU or a core, by `train.precision`. A precision that is not listed
    counts as float32."""
    bandwidth_gb_s: Positive
    """Memory bandwidth of a GPU or a core, in 10^9 bytes per second."""
    flops_efficiency: Fraction = 0.5
    """Fraction of the peak TFLOPS that a compute-bound layer reaches."""
    bandwidth_efficiency: Fraction = 0.5
    """Fraction of the bandwidth that a memory-bound layer reaches."""
    layer_us: Positive = 35.0
    """Minimum duration of a layer's forward pass, in microseconds."""
    link_gb_s: Positive | None = None
    """Bandwidth between the GPUs of a machine in each direction, in 10^9 bytes per second. Default:
    the network bandwidth."""
    network_gbit_s: Positive
    """Bandwidth between machines in each direction, in 10^9 bits per second."""
    latency_us: Positive = 50.0
    """Latency of a message between two replicas, in microseconds."""
    usd_per_hour: dict[Literal["on_demand", "spot"], NonNegative]
    """Price of a machine per hour, in US dollars."""

    def peak_flops(self, precision: str) -> float:
        """Return the peak operations per second of a GPU or a core."""
        by_name: dict[str, float] = {**self.tflops}
        return 1e12 * by_name.get(precision, by_name["float32"])

    @model_validator(mode="after")
    def _require_float32(self) -> Self:
        if "float32" not in self.tflops:
            raise ValueError("tflops needs a value for float32")
        return self


class PlanSettings(Spec):
    """What to plan for."""

    gpu: str
    """Kind of GPU: the name of an entry in the table of machines. `cpu` plans for machines without
    GPUs."""
    workers: PositiveInt | None = None
    """Number of worker processes. Default: the maximum of `train.num_workers`."""
    machines: str = str(TABLE)
    """YAML file with machines and prices, such as an edited copy of ray_jobs/plan/gpus.yaml."""
    rows: PositiveInt = 10_000
    """Number of training rows to assume if `data.prepared` does not exist yet."""
    numbers: NonNegativeInt = 16
    """Number of numeric columns to assume if `data.prepared` does not exist yet and
    `prepare.numeric_columns` does not name them."""
    output: str | None = None
    """JSON file to write the plan to."""


class PlanSpec(SearchSpec, PlanSettings):
    """A run, and the machines to plan it for."""

    @model_validator(mode="after")
    def _require_valid_run(self) -> Self:
        self.run_spec()
        return self

    def machine(self) -> MachineSpec:
        """Return the machine to plan for.

        Raises:
            ValueError: If the table is invalid or does not contain the machine.
        """
        machines = read_machines(self.machines)
        return machines[require_one_of(self.gpu.lower(), tuple(machines), "gpu")]

    def run_spec(self) -> RunSpec:
        """Return the run on these machines.

        Raises:
            ValueError: If the machine is unknown, or the workers cannot share the global batch.
        """
        tree = self.model_dump(mode="json", include=set(RunSpec.model_fields))
        workers = self.workers or self.train.workers_range[1]
        use_gpu = self.machine().gpus > 0
        for path, value in (("train.num_workers", workers), ("train.use_gpu", use_gpu)):
            tree = command_line.with_value(tree, path, value)
        return command_line.validate_spec(RunSpec, tree)


def read_machines(path: str) -> dict[str, MachineSpec]:
    """Return the machines of a table by name.

    Raises:
        UsageError: If the table cannot be read or is invalid.
    """
    tree: dict[str, Any] = command_line.read_yaml(path)
    machines = {}
    for name, machine in tree.items():
        if not isinstance(machine, dict):
            kind = type(machine).__name__
            raise UsageError(f"{path}: {name} must be a mapping, but is a {kind}")
        try:
            machines[str(name)] = command_line.validate_spec(MachineSpec, machine)
        except UsageError as error:
            raise UsageError(f"{path}, {name}: {error}") from None
    if not machines:
        raise UsageError(f"{path} contains no machines; copy {TABLE} and edit it")
    return machines
