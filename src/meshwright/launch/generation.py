"""What is known of the ranks of one generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from meshwright.launch.groups import Place, RankGroup
from meshwright.launch.messages import Event, Failure, RanksBegun, RankStopped, Returned

#: How long the other ranks of a group have for their own words after one has failed.
SETTLE_SECONDS = 0.2


class Generation:
    """The ranks at `places`, followed by the events that `take` is given."""

    def __init__(self, groups: Sequence[RankGroup], places: Sequence[Place]) -> None:
        self.groups = groups
        self._waiting = {(place.role, place.rank) for place in places}
        self.nodes = {place.node for place in places}
        self._silent_nodes = set(self.nodes)
        self._results: dict[tuple[str, int], Any] = {}
        self._end_at: dict[str, float] = {}  # role that failed -> when its other ranks are ended
        self.failures: list[Failure] = []

    @property
    def over(self) -> bool:
        return not self._waiting

    @property
    def begun(self) -> bool:
        """Whether every node has said that its ranks run."""
        return not self._silent_nodes

    @property
    def returned(self) -> bool:
        """Whether every rank has returned a result."""
        return len(self._results) == sum(group.ranks for group in self.groups)

    def results(self) -> list[Any]:
        return [self._results[group.role, rank] for group in self.groups for rank in range(group.ranks)]

    def take(self, event: Event) -> None:
        if isinstance(event, RanksBegun):
            self._silent_nodes.discard(event.node)
        if isinstance(event, Returned | Failure | RankStopped):
            self._waiting.discard((event.role, event.rank))
        if isinstance(event, Returned):
            self._results[event.role, event.rank] = event.result
        if isinstance(event, Failure):
            self.failures.append(event)
            self._end_at.setdefault(event.role, time.monotonic() + SETTLE_SECONDS)

    def roles_to_end(self) -> list[str]:
        """Roles that have failed, once each, after their ranks had time for words of their own."""
        now = time.monotonic()
        due = [role for role, at in self._end_at.items() if at <= now]
        for role in due:
            self._end_at[role] = float("inf")
        return due

    def patience_seconds(self) -> float:
        """How long to wait for the next event."""
        nearest = min((at - time.monotonic() for at in self._end_at.values()), default=1.0)
        return max(0.0, min(nearest, 1.0))
