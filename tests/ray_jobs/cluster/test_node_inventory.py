from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_jobs.cluster.capacity import trials_that_fit
from ray_jobs.cluster.node_inventory import _nodes_of_ray_up

CONFIG = {
    "max_workers": 4,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 2}},
        "small": {"resources": {"CPU": 4}, "max_workers": 3},
        "large": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
    },
}


@pytest.fixture
def bootstrap(tmp_path: Path) -> Path:
    return tmp_path / "ray_bootstrap_config.yaml"


def test_the_configuration_of_ray_up_limits_the_possible_nodes(bootstrap):
    bootstrap.write_text(yaml.safe_dump(CONFIG))
    nodes = _nodes_of_ray_up(bootstrap)
    # `max_workers` allows only four of the five workers.
    assert sorted(node["CPU"] for node in nodes) == [2, 4, 4, 8, 8]
    assert trials_that_fit(nodes, {"CPU": 4}, 1) == 2 + 2 * 2
    assert trials_that_fit(nodes, {"CPU": 1, "GPU": 0.25}, 1) == 8
    assert trials_that_fit(nodes, {"CPU": 4}, 2) == 3
    assert trials_that_fit(nodes, {"CPU": 9}, 1) == 0


@pytest.mark.parametrize(
    "config",
    [
        {**CONFIG, "available_node_types": {"head": {"max_workers": 2, "resources": {}}}},
        {**CONFIG, "available_node_types": {"head": {"resources": {"CPU": 2}}, "small": None}},
        "text",
    ],
)
def test_a_configuration_without_known_resources_adds_no_nodes(bootstrap, config: Any):
    assert _nodes_of_ray_up(bootstrap) == []
    bootstrap.write_text(yaml.safe_dump(config))
    assert _nodes_of_ray_up(bootstrap) == []
