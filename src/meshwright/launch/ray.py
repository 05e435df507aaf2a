"""Agents as actors of a Ray cluster: Ray knows the nodes, and holds the devices and cores for each agent.

The only file that imports ray. Ranks are processes of the agent and never import it.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as cluster_state
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from meshwright import env
from meshwright.errors import CannotWork, InputError, Problem
from meshwright.launch.agent import Leaving, attend, describe_node
from meshwright.launch.groups import Need, Node
from meshwright.launch.hub_files import HubFiles
from meshwright.launch.messages import Dial
from meshwright.launch.network import host_and_port, interface_address, interface_names

CONNECT_SECONDS = 3.0
#: A cluster answers in one; what is no cluster would be waited for by Ray for forty.
ANSWER_SECONDS = 20.0
#: For actors to start on nodes that are known to be free.
PLACE_SECONDS = 60.0
#: For the process of a placed actor to run, or to fail, before its agent is waited for.
BEGIN_SECONDS = 3.0
#: The least object store that Ray takes: nothing of ours goes through it.
OBJECT_STORE_BYTES = 80 << 20
#: Asks a cluster who it is, without a token: one that answers is open to everyone.
ASK_WITHOUT_TOKEN = "import sys; from ray._raylet import GcsClient; print(GcsClient(address=sys.argv[1]).cluster_id)"


@dataclass
class _Agent:
    """An actor, its resources, and Ray's references to the begin and the end of its work."""

    actor: Any
    group: Any
    resources: Mapping[str, float]
    begun: Any
    outcome: Any


class RayBackend:
    """The nodes of the Ray cluster at `address` ("HOST:PORT"), or of one that is started on this machine for the job.

    The driver runs on one of its nodes, with the cluster's token (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, or
    ~/.ray/auth_token). Raises InputError where nobody answers there or the token is missing or wrong, CannotWork where
    the cluster asks for no token, or this machine is none of its nodes.
    """

    def __init__(
        self,
        address: str | None,
        own: tempfile.TemporaryDirectory[str] | None,
        interface: str | None = None,
        devices: int | None = None,
    ) -> None:
        """own, devices: the folder of a cluster that is started for the job, and how many devices it has: more than
        there are share cores; interface: that ranks talk over (None: the one that leads to the hub)."""
        self._files: HubFiles | None = None
        self._agents: dict[str, _Agent] = {}
        self._own, self._interface = own, interface
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        if own is not None:
            options |= {"include_dashboard": False, "_temp_dir": own.name, "num_cpus": devices}
            options["object_store_memory"] = OBJECT_STORE_BYTES
        elif address is not None:
            _require_cluster(address)
            options["address"] = address
        ray.init(**options)
        self._address = ray.util.get_node_ip_address()

    def open(self, files: HubFiles) -> None:
        self._files = files

    def listen(self) -> Sequence[str]:
        return (f"{self._address}:0",)

    def nodes(self, attending: Sequence[Node]) -> Sequence[Node]:
        stated = {node.name: node for node in attending}
        free = available_resources_per_node()
        draining = cluster_state.get_draining_nodes()
        found = []
        for one in _alive():
            held = self._agents[one["name"]].resources if one["name"] in self._agents else {}
            left = {
                name: free.get(one["NodeID"], {}).get(name, 0.0) + held.get(name, 0.0)
                for name in ("CPU", "GPU", "memory")
            }
            gpus = int(one["Resources"].get("GPU", 0))
            here = stated.get(one["name"])
            found.append(
                Node(
                    one["name"],
                    one["NodeManagerAddress"],
                    here.interface if here else "",
                    "cuda" if gpus else "cpu",
                    int(left["GPU"] if gpus else left["CPU"]),
                    int(left["CPU"]),
                    int(left["memory"]),
                    here.link_bytes_per_second if here else 0.0,
                    _seconds_left(draining.get(one["NodeID"])),
                )
            )
        return found

    def agents(self, wanted: Mapping[str, Sequence[Need]]) -> None:
        assert self._files is not None
        started = []
        for name, needs in wanted.items():
            resources = _resources(needs)
            agent = self._agents.get(name)
            if agent is not None:
                holds = all(agent.resources.get(key, 0.0) >= amount for key, amount in resources.items())
                if holds and not ray.wait([agent.outcome], timeout=0)[0]:
                    continue
                self._files.hub.dismiss(name)
                self._end(name)
            self._agents[name] = self._start(name, resources)
            started.append(name)
        for name in started:
            self._require_placed(name)

    def _start(self, name: str, resources: Mapping[str, float]) -> _Agent:
        """An agent in a bundle of its own on node `name`."""
        assert self._files is not None and self._files.network is not None
        node = next((one for one in _alive() if one["name"] == name), None)
        if node is None:
            raise CannotWork(Problem("launch", f"Ray has no node {name} any more", "see `ray status`"))
        address = node["NodeManagerAddress"]
        group = placement_group([{**resources, f"node:{address}": 0.001}])
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        actor = ray.remote(_Actor).options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            scheduling_strategy=strategy,
            max_restarts=0,
        )
        dial = self._files.network
        devices = int(resources.get("GPU", 0) or resources.get("CPU", 0))
        running = actor.remote()
        begun = running.begin.remote(dial.address, name, self._interface, devices)  # type: ignore[attr-defined]
        outcome = running.attend.remote(  # type: ignore[attr-defined]
            dial.address, dial.secret, dial.certificate, name, self._interface, devices
        )
        return _Agent(running, group, resources, begun, outcome)

    def _require_placed(self, name: str) -> None:
        """Raises CannotWork where the actor has no place, or has failed already; one whose process takes longer to
        start is waited for by the driver."""
        agent = self._agents[name]
        if not agent.group.wait(PLACE_SECONDS):
            what = f"Ray has not placed {_in_words(agent.resources)} on node {name} within {PLACE_SECONDS:g} s"
            raise CannotWork(Problem("launch", what, "see `ray status`"))
        ready, _ = ray.wait([agent.begun, agent.outcome], timeout=BEGIN_SECONDS)
        if ready:
            self._raise_cause(name, ready[0])

    def _raise_cause(self, name: str, of: Any) -> None:
        """Raises CannotWork with the real cause of an actor that failed."""
        try:
            ray.get(of)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            what = f"the agent on node {name} failed: {type(cause).__name__}: {cause}"
            raise CannotWork(Problem("launch", what)) from error

    def _end(self, name: str) -> None:
        agent = self._agents.pop(name)
        ray.wait([agent.outcome], timeout=CONNECT_SECONDS)
        ray.kill(agent.actor)
        remove_placement_group(agent.group)

    def close(self) -> None:
        for name in list(self._agents):
            self._end(name)
        ray.shutdown()
        if self._own is not None:
            self._own.cleanup()


class _Actor:
    """An agent inside Ray: `attend` runs as long as the agent attends.

    Its secret and address stay those that it was started with. Where the secrets were replaced while it was out of
    reach, the hub refuses it, and the backend starts another.
    """

    def begin(self, address: str, name: str, interface: str | None, devices: int) -> None:
        """Returns once its process runs on a machine that can attend; raises what keeps it from that."""
        describe_node(Dial(address, "", ""), name, devices, interface)

    def attend(
        self, address: str, secret: str, certificate: str, name: str, interface: str | None, devices: int
    ) -> tuple[str, str]:
        dial = Dial(address, secret, certificate)
        outcome = attend(
            lambda: dial,
            lambda dial: describe_node(dial, name, devices, interface),
            lambda words: print(f"meshwright agent: {words}", file=sys.stderr, flush=True),
            leaving=Leaving(0.0),  # Ray tells the driver of a node that is drained, and nobody here
        )
        return outcome.kind, outcome.words


def _alive() -> list[dict[str, Any]]:
    """Ray's records of its living nodes, with a "name" each: the host's, or host and address where hosts share one."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    hosts = [node["NodeManagerHostname"] for node in nodes]
    for node in nodes:
        host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
        node["name"] = host if hosts.count(host) == 1 else f"{host}@{address}"
    return nodes


def _resources(needs: Sequence[Need]) -> dict[str, float]:
    """What ranks with these needs take, in Ray's words."""
    gpus = sum(need.devices for need in needs if need.kind != "cpu")
    cpus = sum(max(need.cores, need.devices if need.kind == "cpu" else 0) for need in needs)
    memory = sum(need.memory_bytes for need in needs)
    named = {"CPU": float(cpus), "GPU": float(gpus), "memory": float(memory)}
    return {name: amount for name, amount in named.items() if amount}


def _in_words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _seconds_left(deadline_milliseconds: float | None) -> float | None:
    """Seconds until a node that is being drained ends; None for one that is not. Ray's 0 stands for no deadline."""
    if deadline_milliseconds is None:
        return None
    return max(0.0, deadline_milliseconds / 1000 - time.time()) if deadline_milliseconds else 3600.0


def _require_cluster(address: str) -> None:
    """Raises InputError or CannotWork where the driver cannot work with the cluster at `address`. Ray itself would say
    so after 20 s or more, in other words, or not at all."""
    host, port = host_and_port(address, "10.0.0.1:6379")
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        what = f"no Ray cluster answers at {address}: {error.strerror or error}"
        raise InputError(Problem("launch.address", what, "the address that `ray start --head` printed")) from error
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASK_WITHOUT_TOKEN, address],
            env=env.for_child({"RAY_AUTH_MODE": "disabled"}, {}),
            capture_output=True,
            check=False,
            timeout=ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        what = f"what listens at {address} has not answered as a Ray cluster within {ANSWER_SECONDS:g} s"
        raise InputError(Problem("launch.address", what, "the address that `ray start --head` printed")) from error
    if asked.returncode == 0:
        what = f"the Ray cluster at {address} asks for no token: whoever reaches it can run programs on every node"
        how = "start it anew with RAY_AUTH_MODE=token ray start --head --port=" + str(port)
        raise CannotWork(Problem("launch.address", what, how))
    try:
        client = GcsClient(address=address)
    except ray.exceptions.AuthenticationError as error:
        what = f"the Ray cluster at {address} refuses the token: {str(error).splitlines()[0]}"
        how = "give the cluster's with RAY_AUTH_TOKEN_PATH=FILE"
        raise InputError(Problem("launch.address", what, how)) from error
    here = {own for name in interface_names() if (own := interface_address(name)) is not None}
    nodes = {info.node_manager_address for info in client.get_all_node_info().values()}
    if not nodes & here:
        what = f"this machine is no node of the Ray cluster at {address} ({', '.join(sorted(nodes))})"
        raise CannotWork(Problem("launch.address", what, f"run on one of them, or: ray start --address={address}"))
