"""Manifests are what KubeRay takes, and are closed to strangers."""

import json
import re
import shlex
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from ray_jobs.config import command_line
from ray_jobs.config.inference_spec import ServeSpec
from ray_jobs.serve.job import deploy_config
from tests.deployment import DATA, LOCKED, TEXTS, changed, load, wrong_fields

KUBERAY = tuple(f"deploy/kuberay/{name}.yaml" for name in ("raycluster", "rayjob", "rayservice"))


def cluster_of(manifest: Any) -> Any:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def wrong_manifest(manifest: Any) -> list[str]:
    types = json.loads((DATA / "kuberay_crds.json").read_text())["types"]
    found = wrong_fields(manifest, manifest["kind"], types, manifest["kind"])
    if manifest["apiVersion"] != "ray.io/v1":
        found.append(f"apiVersion is {manifest['apiVersion']}")
    if (version := cluster_of(manifest)["rayVersion"]) != LOCKED["ray"]:
        found.append(f"rayVersion is {version}")
    return found


def wrong_opening(manifest: Any) -> list[str]:
    cluster = cluster_of(manifest)
    found = []
    if cluster.get("authOptions", {}).get("mode") != "token":
        found.append("no token is asked for")
    if cluster["headGroupSpec"].get("serviceType", "ClusterIP") != "ClusterIP":
        found.append("the head is open to others than the cluster's pods")
    if cluster["headGroupSpec"].get("enableIngress"):
        found.append("the head has an ingress")
    return found


def wrong_groups(manifest: Any) -> list[str]:
    cluster = cluster_of(manifest)
    head = cluster["headGroupSpec"]
    found = [
        f"the head's {name} is not 0"
        for name in ("num-cpus", "num-gpus")
        if head["rayStartParams"].get(name) != "0"
    ]
    for group in cluster["workerGroupSpecs"]:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            found.append(f"{group['groupName']}: replicas are out of order")
    for group in (head, *cluster["workerGroupSpecs"]):
        name, pod = group.get("groupName", "head"), group["template"]["spec"]
        size = pod["containers"][0]["resources"]
        if size["limits"] != size["requests"]:
            found.append(f"{name}: requests are not limits")
        if ("nvidia.com/gpu" in size["limits"]) != (name == "gpu"):
            found.append(f"{name}: GPUs are in the wrong place")
        memory = {v["name"] for v in pod["volumes"] if v["emptyDir"].get("medium") == "Memory"}
        mounts = pod["containers"][0]["volumeMounts"]
        if not any(m["mountPath"] == "/dev/shm" and m["name"] in memory for m in mounts):
            found.append(f"{name}: /dev/shm is not in memory")
        if pod["restartPolicy"] != "Never":
            found.append(f"{name}: pods are restarted")
    if (
        cluster["autoscalerOptions"].get("version") != "v2"
        or not cluster["enableInTreeAutoscaling"]
    ):
        found.append("no autoscaler of version 2")
    return found


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_takes_the_manifest_and_keeps_it_closed(name):
    checks = (wrong_manifest, wrong_opening, wrong_groups)
    assert [problem for check in checks for problem in check(load(name))] == []


GROUP = "spec/workerGroupSpecs/1"
MISPLANTED = [
    (wrong_manifest, "apiVersion", "ray.io/v1alpha1", "apiVersion is ray.io/v1alpha1"),
    (wrong_manifest, f"{GROUP}/maxReplicas", "8", "maxReplicas is not of type integer"),
    (wrong_manifest, f"{GROUP}/rayStartParams/num-cpus", 4, "num-cpus is not of type string"),
    (wrong_manifest, f"{GROUP}/template/spec/tolerations/0/efect", "x", "[0] has no efect"),
    (wrong_manifest, f"{GROUP}/template/spec/volumes/0/emptyDir", True, "of type EmptyDirVolume"),
    (wrong_opening, "spec/authOptions", {"mode": "disabled"}, "no token"),
    (wrong_opening, "spec/headGroupSpec/serviceType", "LoadBalancer", "open to others"),
    (wrong_opening, "spec/headGroupSpec/enableIngress", True, "ingress"),
    (wrong_groups, "spec/headGroupSpec/rayStartParams", {}, "num-cpus is not 0"),
    (wrong_groups, f"{GROUP}/minReplicas", 9, "out of order"),
    (wrong_groups, f"{GROUP}/template/spec/volumes/0/emptyDir", {}, "gpu: /dev/shm"),
    (wrong_groups, f"{GROUP}/template/spec/containers/0/resources/limits", {}, "wrong place"),
    (wrong_groups, f"{GROUP}/template/spec/restartPolicy", "Always", "gpu: pods are restarted"),
    (wrong_groups, "spec/autoscalerOptions", {}, "no autoscaler of version 2"),
    (wrong_manifest, "spec/rayVersion", "2.59.0", "rayVersion is 2.59.0"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "path", "value", "message"), MISPLANTED)
def test_a_mistake_in_a_manifest_is_found(check, path, value, message):
    manifest = changed(load("deploy/kuberay/raycluster.yaml"), path, value)
    assert any(message in found for found in check(manifest))


def test_jobs_and_services_on_kubernetes_have_the_cluster_that_stays():
    stays, of_job, of_service = (cluster_of(load(name)) for name in KUBERAY)
    assert stays == of_job == of_service


def test_the_service_on_kubernetes_has_the_configuration_that_serve_writes():
    text = TEXTS["deploy/kuberay/rayservice.yaml"]
    comment = " ".join(re.findall(r"^  # (.*)", text, re.M))
    (command,) = re.findall(r"`python -m ray_jobs.serve (.*?) --config_file", comment)
    spec = command_line.parse(ServeSpec, shlex.split(command))
    config = yaml.safe_load(load("deploy/kuberay/rayservice.yaml")["spec"]["serveConfigV2"])
    assert config == deploy_config(spec)
    ServeDeploySchema.model_validate(config)
