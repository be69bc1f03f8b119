from ray_jobs.checks.node_health import clock_findings, gpu_findings, version_findings


def test_different_versions_are_reported_by_node():
    own = {"python": "3.11.7", "keras": "3.15.1", "numpy": "2.1"}
    by_node = {
        "a": own,
        "b": {**own, "keras": "3.1", "numpy": "2.0"},
        "c": {**own, "python": "3.12"},
    }
    found = list(version_findings(own, by_node))
    assert [(f.severity, f.text) for f in found] == [
        ("error", "b has keras 3.1, the driver has 3.15.1"),
        ("warning", "b has numpy 2.0, the driver has 2.1"),
        ("error", "c has python 3.12, the driver has 3.11.7"),
    ]


def test_wrong_clocks_are_reported_by_node():
    late, wrong = clock_findings({"a": 0.1, "b": -2.5, "c": 90.0})
    assert (late.severity, late.text) == ("warning", "the clock of b is 2.5 s behind")
    assert (wrong.severity, wrong.text) == ("error", "the clock of c is 90.0 s ahead")
    (fine,) = clock_findings({"a": 0.012})
    assert fine.text == "all clocks are within 12 ms of the driver's"


def test_gpus_that_tensorflow_cannot_use_are_errors():
    facts = {"gpus": 1, "cuda": "CUDA 12, cuDNN 9", "cudnn": "", "nccl": ""}
    assert [f.severity for f in gpu_findings("a", facts)] == ["ok"]
    (unseen,) = gpu_findings("a", {"gpus": 0, "cuda": "CUDA None, cuDNN None"})
    assert "TensorFlow sees no GPU on a" in unseen.text
    (broken,) = gpu_findings("a", {**facts, "nccl": "OSError: libnccl.so.2"})
    assert "NCCL does not load on a: OSError" in broken.text
