"""What comes with deployment files does its work: spot first, a closed group, a local head."""

import os
import re
import runpy
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deployment import ROOT, TEXTS, load, starts


def make_group(ssh_from: str) -> str:
    run = runpy.run_path(str(ROOT / "deploy/aws_security_group.py"))
    return run["make_group"]("us-west-2", ssh_from)


def added(refused: list[str], demand: dict[str, float]) -> set[str]:
    """Return which kinds of node version 1 of the autoscaler adds after launches were refused."""
    from ray.autoscaler._private.node_provider_availability_tracker import (
        NodeProviderAvailabilityTracker,
    )
    from ray.autoscaler._private.resource_demand_scheduler import ResourceDemandScheduler
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    config = prepare_config(load("cluster.yaml"))
    tracker = NodeProviderAvailabilityTracker(timer=lambda: 100)
    for kind in refused:
        error = NodeLaunchException("InsufficientInstanceCapacity", "no", None)
        tracker.update_node_availability(kind, 100, error)
    scheduler = ResourceDemandScheduler(
        None, config["available_node_types"], config["max_workers"], "head", 1.0
    )
    tags = {"ray-node-type": "head", "ray-user-node-type": "head"}
    scheduler.provider = SimpleNamespace(
        node_tags=lambda node: tags, internal_ip=lambda node: "10.0.0.1"
    )
    launch, _ = scheduler.get_nodes_to_launch(
        ["head-id"], {}, [demand], {}, [], {}, None, tracker.summary()
    )
    return set(launch)


@pytest.mark.parametrize(
    ("refused", "demand", "kinds"),
    [
        ([], {"GPU": 1}, {"gpu_spot"}),
        (["gpu_spot"], {"GPU": 1}, {"gpu_on_demand"}),
        (["gpu_spot", "gpu_on_demand"], {"GPU": 1}, {"gpu_spot"}),
        (["gpu_on_demand"], {"GPU": 1}, {"gpu_spot"}),
        ([], {"CPU": 1}, {"cpu"}),
        (["cpu"], {"CPU": 1}, {"cpu"}),
    ],
)
def test_a_node_on_demand_is_added_while_spot_is_refused(monkeypatch, refused, demand, kinds):
    start = starts(load("cluster.yaml")["head_start_ray_commands"])[0]
    scorer = re.findall(r"RAY_AUTOSCALER_UTILIZATION_SCORER=(\S+?);?\s", start)[0]
    monkeypatch.setenv("RAY_AUTOSCALER_UTILIZATION_SCORER", scorer)
    monkeypatch.syspath_prepend(ROOT / "deploy")
    assert added(refused, demand) == kinds


def test_ray_by_itself_stays_with_spot_that_is_refused():
    # If this fails, Ray avoids refused kinds itself, and spot_first.py can be deleted.
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import (
        CloudResourceMonitor,
    )
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    assert added(["gpu_spot"], {"GPU": 1}) == {"gpu_spot"}
    monitor = CloudResourceMonitor()
    for status in (Instance.ALLOCATION_FAILED, Instance.ALLOCATION_TIMEOUT):
        assert monitor.get_recoverable_resource_availabilities() == {}
        monitor.notify([InstanceUpdateEvent(instance_type="spot", new_instance_status=status)])
    assert set(monitor.get_recoverable_resource_availabilities()) == {"spot"}


@pytest.fixture
def aws(monkeypatch, tmp_path) -> Iterator[Any]:
    """An AWS of moto's, in this process; yields its EC2."""
    moto = pytest.importorskip("moto", reason="needs moto")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # for the key pair that Ray makes
    with moto.mock_aws():
        import boto3

        yield boto3.client("ec2")


def test_the_group_lets_in_ssh_from_one_network_and_its_own_members(aws):
    group = make_group("203.0.113.7/32")
    rules = aws.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    ssh, inside = sorted(rules, key=lambda rule: rule["IpProtocol"], reverse=True)
    assert (ssh["IpProtocol"], ssh["FromPort"], ssh["ToPort"]) == ("tcp", 22, 22)
    assert [r["CidrIp"] for r in ssh["IpRanges"]] == ["203.0.113.7/32"]
    assert not ssh["UserIdGroupPairs"]
    assert (inside["IpProtocol"], inside["IpRanges"]) == ("-1", [])
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [group]


@pytest.mark.parametrize("everyone", ["0.0.0.0/0", "::/0"])
def test_a_group_for_everyone_is_refused(everyone):
    with pytest.raises(ValueError, match=f"ssh_from={everyone} allows everyone"):
        make_group(everyone)


def test_aws_makes_every_node_as_it_is_written(aws):
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    group = make_group("203.0.113.7/32")
    config = prepare_config(load("cluster.yaml"))
    nodes = [node["node_config"] for node in config["available_node_types"].values()]
    for profile in {node["IamInstanceProfile"]["Name"] for node in nodes}:
        boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
    for node in nodes:
        node["SecurityGroupIds"] = [group]
    groups = len(aws.describe_security_groups()["SecurityGroups"])
    config = bootstrap_aws(config)
    validate_config({k: v for k, v in config.items() if k != "head_node"})
    # Ray made none of its own, which would let in ssh from everywhere.
    assert len(aws.describe_security_groups()["SecurityGroups"]) == groups
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node in config["available_node_types"].items():
        tags = {"ray-node-type": "head" if name == "head" else "worker", "ray-node-name": name}
        (made,) = provider.create_node(node["node_config"], tags, 1)
        (found,) = aws.describe_instances(InstanceIds=[made])["Reservations"][0]["Instances"]
        assert found["InstanceType"] == node["node_config"]["InstanceType"]
        assert [g["GroupId"] for g in found["SecurityGroups"]] == [group]
        assert (found.get("InstanceLifecycle") == "spot") == (name == "gpu_spot")


def test_what_aws_refuses_is_what_the_autoscaler_remembers(aws, monkeypatch):
    from botocore.exceptions import ClientError
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    def refuse(**node: Any) -> None:
        answer = {"Error": {"Code": "InsufficientInstanceCapacity", "Message": "no spot"}}
        raise ClientError(answer, "RunInstances")

    config = load("cluster.yaml")
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    monkeypatch.setattr(provider.ec2_fail_fast, "create_instances", refuse)
    node = {**config["available_node_types"]["gpu_spot"]["node_config"], "SubnetIds": ["a", "b"]}
    with pytest.raises(NodeLaunchException, match="no spot"):
        provider.create_node(node, {"ray-node-type": "worker"}, 1)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A project whose `ray` only writes down what it was asked to do."""
    for folder in ("deploy", ".venv/bin", "home"):
        (tmp_path / folder).mkdir(parents=True)
    script = tmp_path / "deploy" / "start_head.sh"
    script.write_text(TEXTS["deploy/start_head.sh"])
    ray = tmp_path / ".venv/bin/ray"
    ray.write_text(
        '#!/bin/sh\necho "$RAY_AUTH_MODE $*" >> "$HOME/asked"\n'
        '[ "$1" = start ] || { mkdir -p ~/.ray; umask 022; echo made > ~/.ray/auth_token; }\n'
    )
    for path in (script, ray):
        path.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("there", [False, True])
def test_the_local_head_has_a_token_that_nobody_else_reads(checkout, there):
    token = checkout / "home" / ".ray" / "auth_token"
    if there:
        token.parent.mkdir()
        token.write_text("kept")
        token.chmod(0o644)
    environment = {**os.environ, "HOME": str(checkout / "home")}
    command = [str(checkout / "deploy/start_head.sh"), "--num-cpus=4"]
    output = subprocess.run(command, env=environment, check=True, text=True, capture_output=True)
    assert token.read_text().strip() == ("kept" if there else "made")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    *made, start = (checkout / "home" / "asked").read_text().splitlines()
    assert made == ([] if there else ["token get-auth-token --generate"])
    assert start.startswith("token start --head --block ")
    assert "--node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --num-cpus=4" in start
    assert "ray job submit" in output.stdout
