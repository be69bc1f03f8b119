"""Settings of `plan`, and the table of machines.

Imports neither Ray nor TensorFlow.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mm_model.nearest_match import require_one_of
from mm_model.spec import NonNegative, Positive, Spec
from ray_jobs.config import command_line
from ray_jobs.config.errors import UsageError
from ray_jobs.config.spec import RunSpec

TABLE = Path(__file__).parent / "gpus.yaml"
CPU = "cpu"
"""The kind of machine that computes without GPUs."""

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Precision = Literal["float32", "mixed_bfloat16", "mixed_float16"]


class MachineSpec(Spec):
    """A kind of machine: its GPUs, or the cores that compute in their place."""

    instance: str
    """What its provider calls it."""
    gpus: NonNegativeInt = 1
    """GPUs of a machine; 0: its cores compute."""
    cpus: PositiveInt
    """Logical CPUs of a machine."""
    memory_gib: Positive
    """Memory of a GPU; without GPUs, of the machine."""
    reserved_gib: NonNegative = 1.0
    """Memory that each replica takes before its first tensor: CUDA's context and libraries, or the
    process itself."""
    layer_mib: NonNegative = 0.0
    """Memory that the graph of a layer takes beside; of GPUs none, since it is in the process."""
    tflops: dict[Precision, Positive]
    """10^12 float operations a second at most, dense, by `train.precision`, of a GPU or a core; a
    precision that is left out is as fast as float32."""
    bandwidth_gb_s: Positive
    """10^9 bytes a second to and from the memory of a GPU, or of a core."""
    flops_efficiency: Share = 0.5
    """Share of the operations that a layer reaches which is bound by them."""
    bandwidth_efficiency: Share = 0.5
    """Share of the bandwidth that a layer reaches which is bound by it."""
    layer_us: Positive = 35.0
    """Microseconds that a layer takes forward at least, however small it is."""
    link_gb_s: Positive | None = None
    """10^9 bytes a second each way between processors of one machine; by default the network's."""
    network_gbit_s: Positive
    """10^9 bits a second each way between machines."""
    latency_us: Positive = 50.0
    """Microseconds that a message takes between two replicas."""
    usd_per_hour: dict[Literal["on_demand", "spot"], NonNegative]
    """Price of a machine."""

    def peak_flops(self, precision: str) -> float:
        """Return operations a second at most, of a GPU or a core."""
        by_name: dict[str, float] = {**self.tflops}
        return 1e12 * by_name.get(precision, by_name["float32"])

    @model_validator(mode="after")
    def _float32_is_said(self) -> Self:
        if "float32" not in self.tflops:
            raise ValueError("tflops needs float32")
        return self


class PlanSettings(Spec):
    """What the plan is for."""

    gpu: str
    """Kind of GPU, an entry of the table of machines; `cpu` computes without."""
    workers: PositiveInt | None = None
    """Worker processes; by default the most of `train.num_workers`."""
    machines: str = str(TABLE)
    """YAML file of machines and prices; copy ray_jobs/plan/gpus.yaml and edit it."""
    rows: PositiveInt = 10_000
    """Training rows, where `data.prepared` is not there yet to say how many they are."""
    numbers: NonNegativeInt = 16
    """Numeric columns, likewise, where `prepare.numeric_columns` does not name them."""
    output: str | None = None
    """File for the plan as JSON."""


class PlanSpec(RunSpec, PlanSettings):
    """The whole of a run, and the machines to plan it for."""

    @model_validator(mode="after")
    def _machine_and_workers_can_be(self) -> Self:
        # Both raise what is wrong.
        self.machine()
        self.run_spec()
        return self

    def machine(self) -> MachineSpec:
        """Return the kind of machine.

        Raises:
            ValueError: if the table is wrong or does not have it.
        """
        return read_machines(self.machines)[self.known_gpu()]

    def known_gpu(self) -> str:
        """Return the name of the kind, as the table has it.

        Raises:
            ValueError: if the table is wrong or does not have it.
        """
        return require_one_of(self.gpu.lower(), tuple(read_machines(self.machines)), "gpu")

    def run_spec(self) -> RunSpec:
        """Return the run on these machines.

        Raises:
            ValueError: if so many workers cannot share the global batch.
        """
        tree = self.model_dump(mode="json", include=set(RunSpec.model_fields))
        workers = self.workers or self.train.workers_range[1]
        use_gpu = self.machine().gpus > 0
        for path, value in (("train.num_workers", workers), ("train.use_gpu", use_gpu)):
            tree = command_line.with_value(tree, path, value)
        return command_line.validate_spec(RunSpec, tree)


def read_machines(path: str) -> dict[str, MachineSpec]:
    """Return the kinds of machines of a table by their names.

    Raises:
        UsageError: if it cannot be read, or holds something else.
    """
    tree: dict[str, Any] = command_line.read_yaml(path)
    found = {}
    for name, machine in tree.items():
        if not isinstance(machine, dict):
            raise UsageError(f"{path}: {name} holds no mapping, but a {type(machine).__name__}")
        try:
            found[str(name)] = command_line.validate_spec(MachineSpec, machine)
        except UsageError as error:
            raise UsageError(f"{path}, {name}: {error}") from None
    if not found:
        raise UsageError(f"{path} names no machine")
    return found
