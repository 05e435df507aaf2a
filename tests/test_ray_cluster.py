"""The Ray that tests run on: a task on each host, nobody without the token, hosts that leave and come again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_cluster import FOLDER, RayCluster, ray_cluster

pytestmark = pytest.mark.slow

#: Prints, for every living member, the host that a task placed there finds itself on.
SPREAD = """
import json, os, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
def where():
    return os.uname().nodename

living = [node for node in ray.nodes() if node["Alive"]]
places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in living]
found = ray.get([where.options(scheduling_strategy=place).remote() for place in places])
print(json.dumps({node["NodeManagerHostname"]: host for node, host in zip(living, found)}))
"""
#: Asks the head who it is, as every client does first.
KNOCK = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1]).cluster_id)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray"), spare=1) as made:
        yield made
    assert [host.processes() for host in made.hosts] == [[], [], [], []]


def spread(cluster: RayCluster) -> dict[str, str]:
    done = cluster.drive(SPREAD, cluster.address)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_a_task_runs_on_each_host_and_on_one_that_joins(cluster: RayCluster) -> None:
    names = [host.name for host in cluster.hosts]
    assert spread(cluster) == {name: name for name in names[:3]}
    cluster.start(cluster.hosts[3])
    assert spread(cluster) == {name: name for name in names}


def test_nobody_is_let_in_without_the_token(cluster: RayCluster, tmp_path: Path) -> None:
    assert cluster.drive(KNOCK, cluster.address).returncode == 0
    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    for environment in (
        {**cluster.environment, "RAY_AUTH_TOKEN_PATH": str(wrong)},
        {**cluster.environment, "RAY_AUTH_MODE": "disabled"},
    ):
        done = cluster.drive(KNOCK, cluster.address, env=environment)
        assert done.returncode != 0
        assert "Authentication token is missing or incorrect" in done.stderr


def test_its_files_are_the_hosts_own(cluster: RayCluster) -> None:
    for host in cluster.hosts[:3]:
        assert "session_latest" in host.run(["ls", FOLDER]).stdout.split()
    assert not Path(FOLDER).exists()
