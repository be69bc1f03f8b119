"""Deployment files are what Ray, AWS and Google take, and are closed to strangers."""

import json
import re
import subprocess
import tomllib
from functools import cache
from typing import Any

import pytest
from botocore.session import get_session
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deployment import DATA, LOCKED, ROOT, TEXTS, changed, load, starts, wrong_fields

PYTHON = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]["pythonVersion"]
PROVIDER_KEYS = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes"},
    "gcp": {"type", "region", "availability_zone", "cache_stopped_nodes", "project_id"},
    "local": {"type", "head_ip", "worker_ips"},
}

# What is wrong with a file of Ray's launcher, beyond what Ray itself checks.


def node_types(config: Any) -> dict[str, Any]:
    return config.get("available_node_types", {})


def wrong_provider(config: Any) -> list[str]:
    provider = config["provider"]
    return [f"unknown {key}" for key in sorted(set(provider) - PROVIDER_KEYS[provider["type"]])]


def wrong_counts(config: Any) -> list[str]:
    found = []
    workers = {n: t for n, t in node_types(config).items() if n != config["head_node_type"]}
    for name, node in workers.items():
        least, most = node.get("min_workers", 0), node["max_workers"]
        if least > most:
            found.append(f"{name}: min_workers {least} is above max_workers {most}")
        if most > config["max_workers"]:
            found.append(f"{name}: max_workers {most} is above that of all kinds")
    if workers and config["max_workers"] > (top := sum(t["max_workers"] for t in workers.values())):
        found.append(f"max_workers {config['max_workers']} is above {top}, that of the kinds")
    return found


def wrong_nodes(config: Any) -> list[str]:
    kind = config["provider"]["type"]
    found = []
    for name, node in node_types(config).items():
        if kind == "gcp":
            types = json.loads((DATA / "gcp_instance.json").read_text())["types"]
            found += wrong_fields(node["node_config"], "Instance", types, name)
            found += wrong_disks(node["node_config"], name)
        else:
            found += [f"{name}: {error}" for error in wrong_instance(node["node_config"])]
    return found


def wrong_disks(node_config: dict[str, Any], name: str) -> list[str]:
    """Return which disks a machine does not take; without a type they are `pd-standard`."""
    types = [disk["initializeParams"].get("diskType", "") for disk in node_config["disks"]]
    is_g2 = node_config["machineType"].startswith("g2-")
    known = ("pd-balanced", "pd-ssd", "hyperdisk-balanced")
    return [f"{name}: G2 takes no {t!r}" for t in types if is_g2 and not t.endswith(known)]


def wrong_instance(node_config: dict[str, Any]) -> list[str]:
    """Return what EC2's RunInstances would not take, by botocore's own model of it."""
    instance = {**node_config, "MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(instance, run_instances())
    return report.generate_report().splitlines()


@cache
def run_instances() -> Any:
    model = get_session().get_service_model("ec2")
    return model.operation_model("RunInstances").input_shape


def wrong_head(config: Any) -> list[str]:
    found = []
    head = node_types(config).get(config.get("head_node_type"), {})
    if head.get("resources", {}).get("GPU") or head.get("node_config", {}).get("guestAccelerators"):
        found.append("the head has a GPU")
    for command in starts(config["head_start_ray_commands"]):
        # No tasks on the head, and a dashboard that is closed to other machines.
        options = ("--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1")
        found += [f"no {option}" for option in options if option not in command]
    return found


def wrong_token(config: Any) -> list[str]:
    found = []
    for who in ("head", "worker"):
        commands = starts(config[f"{who}_start_ray_commands"])
        if not commands or not all("RAY_AUTH_MODE=token" in command for command in commands):
            found.append(f"{who}: Ray starts without RAY_AUTH_MODE=token")
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        found.append("the token is not sent")
    for name, commands in setups(config).items():
        if not any("chmod 600 ~/.ray/auth_token" in command for command in commands):
            found.append(f"{name}: others may read the token")
    return found


def setups(config: Any) -> dict[str, list[str]]:
    """Return the set-up commands of all nodes, and of kinds of node that have their own."""
    own = {n: t.get("worker_setup_commands") for n, t in node_types(config).items()}
    return {"all": config["setup_commands"], **{n: c for n, c in own.items() if c}}


def wrong_setup(config: Any) -> list[str]:
    found = []
    for name, commands in setups(config).items():
        text = "\n".join(commands)
        named = set(re.findall(r"--requirement (\S+)", text))
        locks = {config["file_mounts"].get(remote) for remote in named}
        if locks != {"requirements.lock"}:
            found.append(f"{name}: installs {sorted(named)}, not requirements.lock")
        if "GPU" in node_types(config).get(name, {}).get("resources", {}) and (
            "'tensorflow[and-cuda]'" not in text
        ):
            found.append(f"{name}: has GPUs and no CUDA")
    for local in config["file_mounts"].values():
        if not local.startswith("~") and not (ROOT / local).is_file():
            found.append(f"{local} is not there")
    return found


def wrong_commands(config: Any) -> list[str]:
    """Return the commands that bash does not read."""
    lists = [v for v in (*config.values(), *setups(config).values()) if isinstance(v, list)]
    found = [command for each in lists for command in each if isinstance(command, str)]
    bad = [c for c in found if subprocess.run(["bash", "-n", "-c", c], check=False).returncode]
    return bad if len(found) > 6 else [f"only {len(found)} commands"]


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/gcp.yaml", "deploy/on_premise.yaml"])
def test_ray_takes_the_file_of_its_launcher_which_has_nothing_that_ray_would_not_notice(name):
    validate_config(prepare_config(load(name)))
    checks = (
        wrong_provider, wrong_counts, wrong_nodes, wrong_head, wrong_token, wrong_setup,
        wrong_commands,
    )  # fmt: skip
    assert [problem for check in checks for problem in check(load(name))] == []


GPU = "available_node_types/gpu_spot"
PLANTED = [
    (wrong_provider, "cluster.yaml", "provider/avaliability_zone", "x", "unknown avaliab"),
    (wrong_counts, "cluster.yaml", f"{GPU}/min_workers", 9, "min_workers 9 is above max_workers 8"),
    (wrong_counts, "deploy/gcp.yaml", "max_workers", 17, "is above 16, that of the kinds"),
    (wrong_nodes, "cluster.yaml", f"{GPU}/node_config/InstanceTyp", "x", "InstanceTyp"),
    (wrong_nodes, "deploy/gcp.yaml", f"{GPU}/node_config/scheduling/spot", True, "no spot"),
    (wrong_nodes, "deploy/gcp.yaml", f"{GPU}/node_config/disks", [{"initializeParams": {}}], "G2"),
    (wrong_head, "cluster.yaml", "available_node_types/head/resources", {"GPU": 1}, "has a GPU"),
    (wrong_token, "deploy/gcp.yaml", "worker_start_ray_commands/1", "ray start", "worker: Ray"),
    (wrong_token, "cluster.yaml", "file_mounts", {}, "the token is not sent"),
    (wrong_token, "cluster.yaml", f"{GPU}/worker_setup_commands", ["x"], "may read the token"),
    (wrong_head, "cluster.yaml", "head_start_ray_commands/1", "ray start", "no --dashboard-host"),
    (wrong_setup, "cluster.yaml", "setup_commands/1", "pip install ray", "not requirements.lock"),
    (wrong_setup, "cluster.yaml", "file_mounts", {"~/requirements.lock": "x"}, "x is not there"),
    (wrong_setup, "cluster.yaml", f"{GPU}/worker_setup_commands/1", "x", "no CUDA"),
    (wrong_commands, "cluster.yaml", "setup_commands/1", "if true", "if true"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "name", "path", "value", "message"), PLANTED)
def test_a_mistake_that_ray_does_not_notice_is_found(check, name, path, value, message):
    config = load(name)
    assert any(message in found for found in check(changed(config, path, value)))


# Every file.


def wrong_images(text: str) -> list[str]:
    good = f"{LOCKED['ray']}-py{PYTHON.replace('.', '')}"
    images = re.findall(r"(?:rayproject/ray|multimodal-ray):([\w.-]+)", text)
    pythons = re.findall(r"\bpython(3\.\d+)", text)
    return [f"image {tag}" for tag in images if tag not in (good, f"{good}-gpu")] + [
        f"python{version}" for version in pythons if version != PYTHON
    ]


SECRETS = (
    r"\bA(?:KIA|SIA)[A-Z0-9]{16}\b",
    r"-----BEGIN [A-Z ]*PRIVATE KEY",
    r"\bghp_\w{20}|\bhf_\w{20}|\bxox[abp]-",
    r"(?i)(?:password|secret|token|api_?key)\w*['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9+/_-]{16,}",
)


def wrong_secrets(text: str) -> list[str]:
    return [match[0] for pattern in SECRETS for match in re.finditer(pattern, text)]


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_has_the_locked_versions_and_no_secret(name):
    assert wrong_images(TEXTS[name]) == wrong_secrets(TEXTS[name]) == []


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (wrong_images, "image: rayproject/ray:2.59.0-py311"),
        (wrong_images, f"image: REGISTRY/multimodal-ray:{LOCKED['ray']}-py312-gpu"),
        (wrong_images, "python3.12 -m venv"),
        (wrong_secrets, "aws_access_key_id: AKIA" + "IOSFODNN7EXAMPLE"),
        (wrong_secrets, "RAY_AUTH_TOKEN=" + "0123456789abcdef" * 4),
        (wrong_secrets, '"password": "' + "correct-horse-battery" + '"'),
        (wrong_secrets, "-----BEGIN RSA " + "PRIVATE KEY-----"),
    ],
)
def test_another_version_or_a_secret_is_found(check, text):
    assert check(text) != []


def test_the_lock_file_has_what_the_nodes_run():
    assert {"ray", "tensorflow", "keras", "cryptography"} <= set(LOCKED)


def test_the_readme_names_only_files_that_are_there():
    readme = TEXTS["deploy/README.md"]
    assert set(re.findall(r"deploy/[\w/.]+\w", readme)) <= set(TEXTS)
    table = re.findall(r"^\| `([^`]+)`", readme, re.M)
    assert table
    assert all((ROOT / "deploy" / name).exists() for name in table)
