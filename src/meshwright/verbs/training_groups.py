"""Which ranks a training run wants on the nodes there are: what `launch.keep` asks on every event."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from meshwright.errors import CannotWork, Problem, RunFailed
from meshwright.launch import Finished, Need, Node, RankGroup, Wait, Waited
from meshwright.launch.groups import nodes_in_words
from meshwright.launch.hub_files import Before
from meshwright.launch.messages import Event, Failure, NodeJoined, NodeLeaving, NodeLost
from meshwright.plan import Plan

if TYPE_CHECKING:
    from meshwright.cluster import Cluster
    from meshwright.job import Job
    from meshwright.run import RunFolder

#: Failures that concern the place and not the work: a new start may go well.
OF_THE_PLACE = ("signal", "memory", "stopped", "silent", "unreachable")
#: Starts after failures without a checkpoint in between, before a run gives up.
STARTS_WITHOUT_PROGRESS = 3
#: gloo over a network, one message; and where an interface states no speed: a gigabit.
NETWORK_LATENCY_SECONDS = 100e-6
USUAL_LINK_BYTES_PER_SECOND = 125e6


def training_group(
    folder: RunFolder, chosen: Plan, kind: str, *, resume: bool, share: Share | None = None
) -> RankGroup:
    """The ranks that train `folder` as `chosen` says on devices of `kind`, of the nodes of `share` (None: wherever).
    The tensor-parallel neighbours share a node where one can hold them."""
    layout = chosen.chosen.layout
    per_node = 0 if share is None else share.per_node
    near = layout.tp if not per_node or per_node % layout.tp == 0 else 1
    return RankGroup(
        "rank",
        "meshwright.train:work",
        {"run": str(folder.path.resolve()), "resume": resume},
        layout.devices,
        near=near,
        most_per_node=per_node,
        nodes=() if share is None else tuple(node.name for node in share.nodes),
        need=Need(kind=kind),
        keep_memory=chosen.chosen.keeps_freed_memory,
    )


@dataclass(frozen=True)
class Share:
    """Nodes of one kind of device that take `per_node` ranks each, `devices` in all."""

    nodes: tuple[Node, ...]
    per_node: int

    @property
    def devices(self) -> int:
        return len(self.nodes) * self.per_node


def equal_shares(nodes: Sequence[Node], wanted: int | None) -> list[Share]:
    """Equal parts of nodes of one kind, at most `wanted` devices, from the most devices to the fewest; of equally many,
    those on the fewest nodes first."""
    shares = [
        Share(tuple(chosen[:count]), per_node)
        for kind in dict.fromkeys(node.kind for node in nodes)
        for per_node in range(1, max(node.devices for node in nodes) + 1)
        for chosen in [[node for node in nodes if node.kind == kind and node.devices >= per_node]]
        for count in range(1, len(chosen) + 1)
    ]
    fitting = [share for share in shares if wanted is None or share.devices <= wanted]
    return sorted(fitting, key=lambda share: (-share.devices, -share.per_node))


def equal_share(nodes: Sequence[Node], wanted: int | None) -> Share | None:
    """The first of `equal_shares`; None without any."""
    return next(iter(equal_shares(nodes, wanted)), None)


class OneStart:
    """The ranks of one plan, started once: a failure of one ends the run."""

    def __init__(self, folder: RunFolder, planned: Plan, kind: str, *, resume: bool) -> None:
        self.planned = planned
        self._groups = [training_group(folder, planned, kind, resume=resume)]

    def __call__(self, event: Event | Finished | Waited | None, nodes: Sequence[Node]) -> list[RankGroup] | None:
        return self._groups if event is None else None

    def begin(self) -> None:
        """Nothing is to be remembered of the only start."""

    def adopt(self, before: Before) -> None:
        """Ranks of this machine end with their driver: there is nothing to adopt."""

    def holds(self, node: str, more_bytes: int) -> None:
        """There is one node, which has the run's disk."""


class TrainingGroups:
    """Plans for the nodes there are, and again when some join, leave or are lost. `planned` is the plan of the groups
    that it named last."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        plan_for: Callable[[Share], Plan],
        *,
        resume: bool,
        may_grow: bool,
    ) -> None:
        """plan_for raises CannotWork where no layout fits; may_grow: it waits for nodes that lack, for they may come by
        themselves."""
        self._job, self._folder, self._plan_for = job, folder, plan_for
        self._resume, self._may_grow = resume, may_grow
        self._share: Share | None = None  # at work
        self._found: Share | None = None  # named last
        self._starts, self._starts_in_vain, self._progress = 0, 0, 0
        self.planned: Plan | None = None
        self._planned_at_work: Plan | None = None
        self._held_bytes: dict[str, float] = {}  # node that has been at work -> what it has of the run's files

    def __call__(self, event: Event | Finished | Waited | None, nodes: Sequence[Node]) -> list[RankGroup] | Wait | None:
        """The groups wanted now; see launch.keep."""
        if isinstance(event, Finished) or (isinstance(event, Failure) and not self._may_go_on(event)):
            return None
        if isinstance(event, Failure):
            self._share = None
            what = f"{event.role} {event.rank} on {event.node}: {event.message}"
            self._folder.append_event("failure", reason=what, rank=event.rank, node=event.node, cause=event.kind)
        if isinstance(event, NodeLost):
            self._held_bytes.pop(event.node.name, None)
        # Where there are more nodes than are wanted, those that need to be sent the least are taken.
        staying = [node for node in nodes if node.leaving_seconds is None]
        staying.sort(key=lambda node: -self._held_bytes.get(node.name, 0.0))
        if isinstance(event, NodeLeaving) and not staying:
            return None  # its ranks save and return by themselves
        least = self._least(waited=isinstance(event, Waited))
        shares = [share for share in equal_shares(staying, self._job.cluster.devices) if share.devices >= least]
        if not shares:
            return self._lack(event, nodes)
        at_work = self._share if isinstance(event, NodeJoined | NodeLeaving | NodeLost) else None
        if at_work is not None and self._untouched(at_work, staying):
            shares = [share for share in shares if share.devices > at_work.devices]
        found = self._first_that_fits(shares, may_lack=at_work is not None)
        if found is None:  # the ranks at work stay; those that lose their node save and return
            self._found, self.planned = at_work, self._planned_at_work
            return None
        share, planned = found
        self._found, self.planned = share, planned
        resume = self._resume or self._starts > 0
        kind = share.nodes[0].kind
        return [training_group(self._folder, planned, kind, resume=resume, share=share)]

    def _untouched(self, share: Share, staying: Sequence[Node]) -> bool:
        names = {node.name for node in staying}
        return all(node.name in names for node in share.nodes)

    def _first_that_fits(self, shares: Sequence[Share], *, may_lack: bool) -> tuple[Share, Plan] | None:
        """The first share with a plan, and that; of a run that has begun also one of fewer devices than there are.
        Where none has one: None if that may be, else the CannotWork of the first is raised."""
        error: CannotWork | None = None
        for share in shares if self._starts else shares[:1]:
            try:
                return share, self._plan_for(share)
            except CannotWork as refused:
                error = error or refused
        if error is not None and not may_lack:
            raise error
        return None

    def begin(self) -> None:
        """The groups that were named last are about to be started."""
        self._share, self._starts = self._found, self._starts + 1
        for node in self._share.nodes if self._share is not None else ():
            self._held_bytes.setdefault(node.name, math.inf)  # until it says that it lacks the run's disk
        self._planned_at_work = self.planned

    def adopt(self, before: Before) -> None:
        """Ranks of a driver that was killed go on."""
        self._share = Share(before.nodes, len(before.places) // len(before.nodes))
        self._starts, self.planned = 1, Plan.read(self._folder.plan)
        self._found, self._planned_at_work = self._share, self.planned

    def holds(self, node: str, more_bytes: int) -> None:
        """`node` does not see the run's disk, and has copied `more_bytes` of its files."""
        held = self._held_bytes.get(node, 0.0)
        self._held_bytes[node] = more_bytes + (0.0 if math.isinf(held) else held)

    def _least(self, *, waited: bool) -> int:
        """Fewest devices to start with: all that are wanted, but for what has been waited for or was lost."""
        section = self._job.launch
        if self._starts:
            return section.devices_min or 1
        wanted = self._job.cluster.devices or 1
        return wanted if self._may_grow and not waited else section.devices_min or wanted

    def _lack(self, event: Event | Finished | Waited | None, nodes: Sequence[Node]) -> Wait:
        if self._may_grow and not isinstance(event, Waited):
            return Wait(self._job.launch.timeout_seconds)
        what = f"{self._least(waited=True)} devices are needed; there are {nodes_in_words(nodes)}"
        share = equal_share(nodes, None)
        near = f"nearest: cluster.devices={share.devices}" if share else "start nodes"
        if isinstance(event, Waited):
            section = self._job.launch
            what += f" after {section.timeout_seconds:g} s (launch.timeout_seconds)"
            near = f"on each node: python -m meshwright.launch.agent --run {self._folder.path}"
            raise RunFailed(Problem("cluster.devices", what, near))  # another time they may be there
        raise CannotWork(Problem("cluster.devices", what, near))

    def _may_go_on(self, failure: Failure) -> bool:
        """Whether another start may go well: the failure is of the place, and not the fourth without a checkpoint."""
        if failure.kind not in OF_THE_PLACE and not failure.consequence:
            return False
        newest = max(
            (event["step"] for event in self._folder.each_event() if event["event"] == "checkpoint"), default=0
        )
        if newest > self._progress:
            self._progress, self._starts_in_vain = newest, 0
        self._starts_in_vain += 1
        return self._starts_in_vain <= STARTS_WITHOUT_PROGRESS


def cluster_of_share(job: Job, share: Share) -> Cluster:
    """The cluster to plan for: devices as `cluster.named` says, or such as this machine has, on the nodes of `share`.

    Raises CannotWork where the nodes have another kind of device than this machine and none is named.
    """
    from meshwright.cluster import Link, named_cluster, this_machine

    if job.cluster.named is not None:
        return named_cluster(job.cluster.named, share.devices, share.per_node)
    here = this_machine(share.per_node, share.per_node)
    kind = share.nodes[0].kind
    if here.device.kind != kind:
        what = f"the nodes have {kind} devices and this machine {here.device.kind} ones, so their speed is not known"
        raise CannotWork(Problem("cluster.named", what, "name them: cluster.named=h100-sxm-80gb"))
    if len(share.nodes) == 1:
        return here
    rate = min(node.link_bytes_per_second or USUAL_LINK_BYTES_PER_SECOND for node in share.nodes)
    inter = Link("network", min(rate / share.per_node, here.intra.bytes_per_second), NETWORK_LATENCY_SECONDS)
    assumed = (*here.assumed, f"network of {rate * 8 / 1e9:.3g} Gbit/s between nodes, as its interfaces state")
    return replace(here, devices=share.devices, inter=inter, assumed=assumed)
