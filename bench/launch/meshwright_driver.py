"""Meshwright's driver in the benchmark: as many ranks as hosts attend, started again whenever they change.

python bench/launch/meshwright_driver.py FOLDER STEPS ADDRESS HOSTS_LEAST
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshwright.launch import Finished, Node, RankGroup, Wait, Waited, keep
from meshwright.launch.awaited import AwaitedBackend
from meshwright.launch.messages import NodeJoined
from meshwright.run import RunFolder

#: A host that was away is waited for, and ranks outlive a driver that is started again.
PATIENCE_SECONDS = 600.0


def main() -> None:
    folder, steps, address, least = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    run = RunFolder(folder)
    at_work = 0

    def ask(event: Any, nodes: Sequence[Node]) -> list[RankGroup] | Wait | None:
        staying = [node for node in nodes if node.leaving_seconds is None]
        if isinstance(event, Finished) or (isinstance(event, NodeJoined) and len(staying) == at_work):
            return None
        if len(staying) < least and not isinstance(event, Waited):
            return Wait(PATIENCE_SECONDS)
        payload = {"folder": str(folder), "steps": steps}
        return [RankGroup("rank", "meshwright_rank:work", payload, len(staying), most_per_node=1)]

    def begin(groups: Sequence[RankGroup]) -> int:
        nonlocal at_work
        at_work = groups[0].ranks
        return run.grant_lease()

    with keep(
        AwaitedBackend(address),
        ask,
        folder / "logs",
        hub_folder=run.hub,
        on_start=begin,
        patience_seconds=PATIENCE_SECONDS,
    ) as launch:
        launch.wait()


if __name__ == "__main__":
    main()
