"""The doctor finds each fault that it knows, names it, and says what mends it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from ray_jobs.checks import resources, storage_access, versions
from ray_jobs.checks.finding import Finding
from ray_jobs.checks.local import weights_problem
from ray_jobs.checks.probe import Node, Probe
from ray_jobs.cluster.connection import _require_answer
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
    """A run on prepared data of a few shards; all is well with it."""
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
    return {finding.check: finding for finding in found if finding.status == "error"}


def damage(prepared: Path) -> Path:
    """Change a byte of a shard, which keeps its size."""
    shard = prepared / "train/part-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return shard


# -- on one node ----------------------------------------------------------------------------------


def test_where_all_is_well_each_check_says_so_and_nothing_is_left(ray_local, spec, capsys):
    found = examine(spec)
    assert {f.status for f in found} <= {"ok", "skipped"}
    checks = [f.check for f in found if f.status == "ok"]
    assert checks == [
        "working folder", "manifest", "workers", "budgets", "versions", "clocks", "shared memory",
        "storage", "data",
    ]  # fmt: skip
    assert list(Path(spec.run.storage_path).iterdir()) == []
    out = capsys.readouterr().out
    assert "✓ versions" in out
    assert "6 of 6 shards read whole" in out


@pytest.mark.parametrize(
    ("changes", "check", "text", "remedy"),
    [
        ({"run.storage_path": "TMP/file/runs"}, "storage", "cannot be written", "choose another"),
        ({"train.num_workers": 8}, "workers", "8 workers of 1 CPU, each", "lower train.num_worker"),
        ({"train.cpus_per_worker": 64}, "workers", "a worker of 64 CPU", "cpus_per_worker"),
        ({"model.image.weights": "/no/such.weights.h5"}, "weights", "no such file", "to none"),
        ({"data.object_store_memory": 10**13}, "budgets", "is more than", "--object-store-memory"),
        ({"data.prepared": "TMP/elsewhere"}, "manifest", "no manifest.json", "has `python -m"),
        ({"working_dir": "TMP/large"}, "working folder", "holds 120.0 MB to send", "excludes"),
    ],
)
def test_a_fault_is_found_named_and_mended(ray_local, spec, tmp_path, changes, check, text, remedy):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "large").mkdir()
    with open(tmp_path / "large/weights.bin", "wb") as large:
        large.truncate(120_000_000)
    changes = {k: str(v).replace("TMP", str(tmp_path)) for k, v in changes.items()}
    found = errors(list(findings(spec.overlay(changes))))
    assert list(found) == [check]
    assert text in found[check].text
    assert remedy in found[check].sentence


def test_a_damaged_shard_is_found_and_ends_in_status_1(ray_local, spec, capsys):
    shard = damage(Path(spec.data.prepared))
    with pytest.raises(JobError, match=rf"data: {shard}, read on .*: its content is not that of"):
        examine(spec)
    assert "→ prepare the data again" in capsys.readouterr().out


def test_where_nothing_answers_at_an_address_it_is_said_in_seconds():
    with pytest.raises(JobError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: .*refused"):
        _require_answer("127.0.0.1:1")
    _require_answer("auto")


def test_other_versions_and_clocks_that_go_wrong_are_told_by_node():
    here = {"python": "3.11.7", "keras": "3.15.1", "numpy": "2.1"}
    there = {
        "a": here,
        "b": {**here, "keras": "3.1", "numpy": "2.0"},
        "c": {**here, "python": "3.12"},
    }
    found = list(versions.version_findings(here, there))
    assert [(f.status, f.text) for f in found] == [
        ("error", "b has keras 3.1, the driver 3.15.1"),
        ("warning", "b has numpy 2.0, the driver 2.1"),
        ("error", "c has python 3.12, the driver 3.11.7"),
    ]
    late, wrong = versions.clock_findings({"a": 0.1, "b": -2.5, "c": 90.0})
    assert (late.status, late.text) == ("warning", "the clock of b is 2.5 s behind")
    assert (wrong.status, wrong.text) == ("error", "the clock of c is 90.0 s ahead")
    (fine,) = versions.clock_findings({"a": 0.012})
    assert fine.text == "within 12 ms of the driver's"


def test_gpus_that_tensorflow_does_not_see_or_cannot_use_are_errors():
    facts = {"gpus": 1, "cuda": "CUDA 12, cuDNN 9", "cudnn": "", "nccl": ""}
    assert [f.status for f in versions.gpu_findings("a", facts)] == ["ok"]
    (unseen,) = versions.gpu_findings("a", {"gpus": 0, "cuda": "CUDA None, cuDNN None"})
    assert "TensorFlow on a sees no GPU" in unseen.text
    (broken,) = versions.gpu_findings("a", {**facts, "nccl": "OSError: libnccl.so.2"})
    assert "NCCL does not load on a: OSError" in broken.text


def test_what_an_autoscaler_may_add_counts(monkeypatch, spec):
    here = [Node("0" * 40, "a", {"CPU": 2.0}, None)]
    spec = spec.overlay({"train.num_workers": 8})
    (few,) = resources.workers(spec, here)
    assert few.status == "error"
    monkeypatch.setattr(resources, "possible_nodes", lambda: [{"CPU": 4.0}] * 3)
    (later,) = resources.workers(spec, here)
    assert (later.status, later.text) == (
        "ok", "8 workers of 1 CPU fit once the autoscaler has added nodes",
    )  # fmt: skip
    (few,) = resources.workers(
        spec.overlay({"train.num_workers": 16, "train.global_batch_size": 16}), here
    )
    assert "do not fit on 2 CPU, nor on what the autoscaler may add: 3 × 4 CPU" in few.text


def test_a_store_that_an_autoscaler_would_enlarge_is_no_error(monkeypatch, spec):
    here = [Node("0" * 40, "a", {"CPU": 2.0, "object_store_memory": 4e9, "memory": 8e9}, None)]
    spec = spec.overlay({"data.object_store_memory": 10**10})
    assert [found.status for found in resources.budgets(spec, None, here)] == ["error"]
    monkeypatch.setattr(resources, "possible_nodes", lambda: [{"CPU": 4.0}] * 3)
    assert [found.status for found in resources.budgets(spec, None, here)] == ["warning"]


def test_a_package_that_is_imported_from_elsewhere_than_its_version_says_so(tmp_path, monkeypatch):
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    assert Probe().versions()["keras"].endswith(f"(but imported from {tmp_path}/keras)")


def test_weights_are_looked_for_where_they_are_said_to_be(tmp_path, monkeypatch):
    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr("ray_jobs.checks.local._IMAGENET", "https://127.0.0.1:1/")
    assert "of https://127.0.0.1:1/, it cannot be reached" in weights_problem(
        "imagenet", "efficientnet_b5"
    )
    (models / "efficientnetb5_notop.h5").write_bytes(b"")
    assert weights_problem("imagenet", "efficientnet_b5") == ""
    (models / "weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5").write_bytes(b"")
    assert weights_problem("imagenet", "mobilenet_v3_small") == ""
    file = tmp_path / "own.weights.h5"
    assert weights_problem(str(file), "tiny") == "there is no such file"
    assert weights_problem(file.as_uri(), "tiny") == "there is no such object"
    file.write_bytes(b"")
    assert weights_problem(str(file), "tiny") == weights_problem(file.as_uri(), "tiny") == ""


def test_weights_behind_a_signed_address_are_fetched_as_training_would_and_not_repeated(tmp_path):
    class Signed(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(206 if self.path.endswith("?key=of-get") else 403)
            self.end_headers()

        def log_message(self, *_):
            pass

    with serving(Signed) as address:
        assert weights_problem(f"{address}/a.weights.h5?key=of-get", "tiny") == ""
        assert weights_problem(f"{address}/a.weights.h5?key=other", "tiny") == "it answers 403"


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer HTTP on loopback; yield the address."""
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_every_node_reads_other_shards_while_there_are_others(tmp_path):
    manifest = write_prepared(tmp_path, {"train": 100, "validation": 100, "test": 100})
    read = storage_access.sample(manifest, num_nodes=3, num_shards=4)
    assert [len(shards) for shards in read] == [4, 4, 4]
    assert len({shard.path for shards in read for shard in shards}) == 12
    assert len({s.path for shards in storage_access.sample(manifest, 9, 4) for s in shards}) == 15


# -- on several nodes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Callable]]:
    """A head, and what makes another host a node of it, in a mount namespace of its own."""
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
    """Run a job on the head, as a user would."""
    file = Path(spec.run.storage_path).parent / "spec.yaml"
    sections = spec.model_dump(mode="json", include=set(RunSpec.model_fields))
    file.write_text(yaml.safe_dump(sections))
    words = (sys.executable, "-m", f"ray_jobs.{verb}", str(file), *flags)
    return subprocess.run(head.command(*words), cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_two_nodes_that_are_alike_exchange_arrays(machines, spec):
    head, node = machines
    with node():
        address = f"{head.address}:6379"
        workers = ("--train.num_workers", "2", "--train.cpus_per_worker", "2")
        done = job(head, "doctor", spec, "--address", address, *workers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "the same here and on 2 nodes" in done.stdout
    assert re.search(r"two workers on two nodes exchange [\d,]+ MB/s", done.stdout)


@pytest.mark.slow
def test_a_node_that_is_unlike_the_others_is_found_by_each_of_its_faults(machines, spec, tmp_path):
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
    (name,) = re.findall(r"(\S+ \(\w+\)) has keras 3\.1\.0, the driver 3\.15", found.stdout)
    for told in (found.stdout, refused.stderr):
        assert f"{name} has keras 3.1.0, the driver" in told
        assert f"{name} does not see what the driver" in told
        assert f"weights={weights} on {name}: there is no such file" in told
    assert "→ use a disk that every node mounts" in found.stdout
    assert "Traceback" not in found.stderr + refused.stderr
    assert not list(runs.glob("*/checkpoints"))
