"""The doctor finds each kind of problem and names a remedy."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from ray_jobs.checks.finding import Finding
from ray_jobs.config.errors import JobError
from ray_jobs.config.spec import RunSpec
from ray_jobs.doctor.job import DoctorSpec, examine, findings
from tests.ray_jobs.heads import TOKEN
from tests.ray_jobs.hosts import Host, hosts, nodes_of, ray_node, started, wait_until
from tests.ray_jobs.scenarios import PLAIN
from tests.ray_jobs.tiny import write_prepared

ROOT = Path(__file__).parents[3]


@pytest.fixture
def spec(tmp_path: Path) -> DoctorSpec:
    """A run without problems on a few shards of prepared data."""
    write_prepared(tmp_path / "prepared", {"train": 45, "validation": 21, "test": 5})
    return DoctorSpec.model_validate(
        {
            "run": {"storage_path": str(tmp_path / "runs")},
            "data": {"prepared": str(tmp_path / "prepared")},
            "model": PLAIN,
            "train": {"global_batch_size": 8},
        }
    )


def errors(found: list[Finding]) -> dict[str, Finding]:
    return {finding.code: finding for finding in found if finding.severity == "error"}


# -- on one node ----------------------------------------------------------------------------------


def test_without_problems_every_check_is_ok_and_no_file_remains(ray_local, spec, capsys):
    found = examine(spec)
    assert {f.severity for f in found} <= {"ok", "skipped"}
    checks = [f.code for f in found if f.severity == "ok"]
    assert checks == [
        "working_folder", "manifest", "workers", "budgets", "versions", "clocks", "shared_memory",
        "storage", "data",
    ]  # fmt: skip
    assert list(Path(spec.run.storage_path).iterdir()) == []
    out = capsys.readouterr().out
    assert "✓ versions" in out
    assert "6 of 6 shards read in full match the manifest" in out


@pytest.mark.parametrize(
    ("changes", "check", "text", "remedy"),
    [
        ({"run.storage_path": "TMP/file/runs"}, "storage", "cannot write to", "choose another"),
        ({"train.num_workers": 8}, "workers", "run 8 workers with 1 CPU each", "lower"),
        ({"train.cpus_per_worker": 64}, "workers", "run a worker with 64 CPU", "cpus_per_worker"),
        ({"model.image.weights": "/no/such.weights.h5"}, "weights", "no such file", "to none"),
        ({"data.object_store_memory": 10**13}, "budgets", "exceeds the", "--object-store-memory"),
        ({"data.prepared": "TMP/elsewhere"}, "manifest", "no manifest.json", "run `python -m"),
        ({"working_dir": "TMP/large"}, "working_folder", "has 120.0 MB to upload", "excludes"),
    ],
)
def test_each_problem_is_found_with_its_remedy(
    ray_local, spec, tmp_path, changes, check, text, remedy
):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "large").mkdir()
    with open(tmp_path / "large/weights.bin", "wb") as large:
        large.truncate(120_000_000)
    changes = {k: str(v).replace("TMP", str(tmp_path)) for k, v in changes.items()}
    found = errors(list(findings(spec.overlay(changes))))
    assert list(found) == [check]
    assert text in found[check].text
    assert remedy in found[check].sentence


def test_a_damaged_shard_is_an_error(ray_local, spec, capsys):
    shard = Path(spec.data.prepared) / "train/part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(JobError, match=rf"data: {shard}, read on .*: its content does not match"):
        examine(spec)
    assert "→ prepare the data again" in capsys.readouterr().out


# -- on several nodes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Callable]]:
    """A head, and a function that joins another host to it, in its own mount namespace."""
    folder = tmp_path_factory.mktemp("machines")
    temporary = tempfile.mkdtemp(prefix="ray-")
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with patch.dict(os.environ, environment), ExitStack() as stack:
        head, other = stack.enter_context(hosts(2))
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        command = ray_node(head, "--num-cpus=3", f"--temp-dir={temporary}")
        stack.enter_context(started(command, folder / "head.log"))

        @contextmanager
        def node(hidden: Sequence[Path] = (), **variables: str) -> Iterator[None]:
            hide = [f"mount -t tmpfs tmpfs {path}" for path in hidden]
            script = " && ".join([*hide, 'exec "$@"'])
            joins = ray_node(other, "--num-cpus=3", head=head)[len(other.command()) :]
            inside = other.command(
                *("env", *(f"{name}={value}" for name, value in variables.items())),
                *("unshare", "--mount", "sh", "-c", script, "sh", *joins),
            )
            address = f"{head.address}:6379"
            with started(inside, folder / "node.log"):
                wait_until(lambda: len(nodes_of(address, head.command())) == 2, 60, "it joins")
                yield

        yield head, node


def job(head: Host, verb: str, spec: DoctorSpec, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a job on the head node, like a user."""
    file = Path(spec.run.storage_path).parent / "spec.yaml"
    sections = spec.model_dump(mode="json", include=set(RunSpec.model_fields))
    file.write_text(yaml.safe_dump(sections))
    words = (sys.executable, "-m", f"ray_jobs.{verb}", str(file), *flags)
    return subprocess.run(head.command(*words), cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_two_equal_nodes_exchange_arrays(machines, spec):
    head, node = machines
    with node():
        address = f"{head.address}:6379"
        workers = ("--train.num_workers", "2", "--train.cpus_per_worker", "2")
        done = job(head, "doctor", spec, "--address", address, *workers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "on the driver and on 2 nodes" in done.stdout
    assert re.search(r"two workers on two nodes exchange [\d,]+ MB/s", done.stdout)


@pytest.mark.slow
def test_each_problem_of_a_different_node_is_found(machines, spec, tmp_path):
    head, node = machines
    wrong = tmp_path / "packages/keras-3.1.0.dist-info"
    wrong.mkdir(parents=True)
    (wrong / "METADATA").write_text("Metadata-Version: 2.1\nName: keras\nVersion: 3.1.0\n")
    weights, runs = tmp_path / "weights/own.weights.h5", tmp_path / "runs"
    weights.parent.mkdir()
    weights.write_bytes(b"")
    runs.mkdir()
    spec = spec.overlay({"model.image.weights": str(weights)})
    with node([weights.parent, runs], PYTHONPATH=str(wrong.parent)):
        found = job(head, "doctor", spec, "--address", f"{head.address}:6379")
        refused = job(head, "train", spec, "--run.address", f"{head.address}:6379")
    assert found.returncode == refused.returncode == 1
    (name,) = re.findall(r"(\S+ \(\w+\)) has keras 3\.1\.0, the driver has 3\.15", found.stdout)
    for output in (found.stdout, refused.stderr):
        assert f"{name} has keras 3.1.0, the driver" in output
        assert f"{name} does not see what the driver" in output
        assert f"weights={weights} on {name}: there is no such file" in output
    assert "→ use a disk that every node mounts" in found.stdout
    assert "Traceback" not in found.stderr + refused.stderr
    assert not list(runs.glob("*/checkpoints"))
