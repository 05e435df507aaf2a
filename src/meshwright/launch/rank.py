"""A rank's side of the hub: its place, the keys by which it meets the others, and what it says to the driver."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.launch.messages import Dial, RankPlace

if TYPE_CHECKING:
    from meshwright.launch.hub_client import HubClient, Keys, Telling
    from meshwright.launch.hub_disk import HubDisk
    from meshwright.launch.wire import hub_pb2 as wire


@dataclass(frozen=True)
class Call:
    """What the driver asks of this rank. `reply` answers it, once."""

    name: str
    body: Any
    blob: bytes
    reply: Callable[..., None]


class Context:
    """A rank's place among the ranks of its role, and its connection to the hub, made on first use.

    rank, world: among the ranks of `role`; local_rank: among those of this node; device: the index of its device on the
    node; generation: rises with every start of ranks; folder: that of the logs; node: its name; copies: a folder of
    the node's own for copies of what is in the run folder, None where the node sees the run folder's disk.
    """

    def __init__(self, place: RankPlace, secret: Callable[[], str] | None = None) -> None:
        """secret: reads the hub's secret, which may be replaced (default: that of `place`)."""
        self.role, self.rank, self.world = place.role, place.rank, place.world
        self.local_rank, self.device = place.local_rank, place.device
        self.generation, self.folder = place.generation, place.folder
        self.node, self.copies = place.node, Path(place.copies) if place.copies else None
        self._dial, self._secret = place.dial, secret or (lambda: place.dial.secret)
        self._telling: Telling | None = None
        #: What must live as long as the rank.
        self.held: list[object] = []

    @classmethod
    def alone(cls) -> Context:
        """That of the only rank, in the process that calls this: nobody started it, and it has no hub."""
        return cls(RankPlace("rank", 0, 1, 0, 0, 0, Path(), Dial("", "")))

    @cached_property
    def _hub(self) -> HubClient:
        from meshwright.launch.hub_client import HubClient  # gRPC is loaded by ranks that use it

        return HubClient(self._dial, self.generation, self._secret)

    @property
    def _name(self) -> wire.RankName:
        from meshwright.launch.wire import hub_pb2 as wire

        return wire.RankName(role=self.role, rank=self.rank)

    def keys(self, prefix: str = "") -> Keys:
        """The keys that this generation's ranks share, all behind `prefix`."""
        from meshwright.launch.hub_client import Keys

        return Keys(self._hub, prefix)

    def hub_disk(self, root: Path) -> HubDisk | None:
        """The run folder `root`, which is the driver's, through the hub, which it waits for as `tell` does; None where
        the node sees its disk."""
        if self.copies is None:
            return None
        from meshwright.launch.hub_disk import HubDisk

        return HubDisk(root, self._hub.read, self._hub.write)

    def tell(self, kind: str, body: Any = None, blob: bytes = b"") -> None:
        """Tells the driver, in the order of the calls and without waiting; body: JSON. What was told has arrived when
        the function of this rank has returned: while the hub is away it waits, for as long as the agent lets it live.
        Raises RunFailed where the hub refuses this rank, ValueError for more than a message takes (64 MiB)."""
        from meshwright.launch.hub_client import Telling
        from meshwright.launch.wire import hub_pb2 as wire

        if self._telling is None:
            self._telling = Telling(self._hub)
        self._telling.put(wire.Told(name=self._name, kind=kind, body=json.dumps(body).encode(), blob=blob))

    def calls(self) -> Iterator[Call]:
        """What the driver asks of this rank, as it comes, until the generation is over."""
        for call in self._hub.calls(self._name):
            yield Call(call.name, json.loads(call.body), call.blob, self._replier(call.id))

    def _replier(self, call_id: int) -> Callable[..., None]:
        from meshwright.launch.wire import hub_pb2 as wire

        def reply(body: Any = None, blob: bytes = b"", error: str = "") -> None:
            answer = wire.CallAnswer(
                name=self._name, id=call_id, body=json.dumps(body).encode(), blob=blob, error=error
            )
            self._hub.answer(answer)

        return reply

    def close(self) -> None:
        """Waits until what was told has arrived."""
        if self._telling is not None:
            self._telling.close()


def place_of(record: dict[str, Any]) -> RankPlace:
    """A rank's place from the JSON that its agent wrote."""
    return RankPlace(**{**record, "folder": Path(record["folder"]), "dial": Dial(**record["dial"])})
