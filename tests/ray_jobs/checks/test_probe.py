import hashlib
import sys
import time

from ray_jobs.checks import probe
from ray_jobs.checks.probe import (
    clock,
    hash_files,
    live_nodes,
    package_versions,
    run_on_each,
    run_on_nodes,
)
from ray_jobs.storage.folder import Folder


def test_a_package_that_is_imported_from_another_place_is_noted(tmp_path, monkeypatch):
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    assert package_versions()["keras"].endswith(f"(but imported from {tmp_path}/keras)")


def test_files_are_hashed_and_missing_ones_have_an_error(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * (5 << 20))
    hashed, (sha, problem) = hash_files(Folder(str(tmp_path)), ["a", "missing"])
    assert hashed == (hashlib.sha256(b"x" * (5 << 20)).hexdigest(), "")
    assert sha is None
    assert problem.startswith("FileNotFoundError: ")


def test_a_function_runs_on_a_node_without_a_cpu_and_its_error_is_one_line(ray_local):
    (node,) = live_nodes()
    results, found = run_on_nodes("clocks", [node], clock)
    assert abs(results[node] - time.time()) < 30
    assert found == []
    results, (finding,) = run_on_nodes("numbers", [node], number, "text")
    assert results == {}
    assert finding.sentence.startswith(f"numbers: {node.name} did not run the check: ValueError")


def test_a_function_that_does_not_return_in_time_is_cancelled(ray_local):
    (node,) = live_nodes()
    results, (finding,) = run_on_each("sleep", {node: (600,)}, sleep, timeout_s=1)
    assert results == {}
    assert f"{probe.NO_ANSWER} within 1 s" in finding.text


def number(text: str) -> float:
    return float(text)


def sleep(seconds: float) -> None:
    time.sleep(seconds)
