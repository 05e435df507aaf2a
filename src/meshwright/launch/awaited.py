"""Nodes whose agents somebody else starts: Slurm, Kubernetes, a person. They dial the hub, and are then there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshwright.errors import CannotWork, Problem
from meshwright.launch.groups import Need, Node, nodes_in_words
from meshwright.launch.hub_files import HubFiles
from meshwright.launch.network import host_and_port


class AwaitedBackend:
    """Listens on `address`, "HOST:PORT" (0: any free port); agents find it by the files of the hub."""

    def __init__(self, address: str) -> None:
        """Raises InputError where `address` is not HOST:PORT."""
        host_and_port(address, "0.0.0.0:7474")
        self._address = address
        self._attending: Sequence[Node] = ()

    def open(self, files: HubFiles) -> None:
        pass

    def listen(self) -> Sequence[str]:
        return (self._address,)

    def nodes(self, attending: Sequence[Node]) -> Sequence[Node]:
        self._attending = attending
        return attending

    def agents(self, wanted: Mapping[str, Sequence[Need]]) -> None:
        if gone := set(wanted) - {node.name for node in self._attending}:
            what = f"{', '.join(sorted(gone))} attends no longer; there are {nodes_in_words(self._attending)}"
            raise CannotWork(Problem("launch", what))

    def close(self) -> None:
        pass
