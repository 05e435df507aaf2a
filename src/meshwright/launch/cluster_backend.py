"""What a cluster must do to run jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from meshwright.launch.groups import Need, Node
from meshwright.launch.hub_files import HubFiles


class ClusterBackend(Protocol):
    """All that a cluster must do. What starts agents limits them, and starts others for those that end."""

    def open(self, files: HubFiles) -> None:
        """Called once, before all else: `files` says how agents reach the hub."""

    def listen(self) -> Sequence[str]:
        """The addresses that the hub listens on, for gRPC: a network's "HOST:PORT", or none."""

    def nodes(self, attending: Sequence[Node]) -> Sequence[Node]:
        """The nodes that there are now; the agents of `attending` run already."""

    def agents(self, wanted: Mapping[str, Sequence[Need]]) -> None:
        """Has an agent run on each of these nodes, holding what the ranks there need. Called again with those that run.
        Raises CannotWork."""

    def close(self) -> None:
        """Ends what `agents` started; the hub has told them that the job is over."""
