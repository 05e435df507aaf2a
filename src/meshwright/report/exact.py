"""What `plan --exact` adds to the terminal: each rehearsed rank beside the formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshwright.cluster import GIB

MIB = 1024**2


def exact_lines(found: Mapping[str, Any]) -> list[str]:
    """Lines of the JSON under chosen.exact: a row a rank, the parts at its worst moment, and the verdict."""
    lines = ["exact   rehearsed on fake tensors: the most that a rank's tensors hold, in MiB"]
    names = list(found["ranks"][0]["parts"])
    head = f"{'rank':>7} {'stage':>5} {'formula':>10} {'rehearsed':>10}"
    lines.append(head + "".join(f" {name:>11}" for name in names) + "  at its worst")
    for one in found["ranks"]:
        moment = f"{one['phase']} of {one['block']}" if one["block"] else one["phase"]
        row = (
            f"{one['rank']:>7} {one['stage']:>5} {one['formula_bytes'] / MIB:>10,.1f} {one['peak_bytes'] / MIB:>10,.1f}"
        )
        lines.append(row + "".join(f" {size / MIB:>11,.1f}" for size in one["parts"].values()) + f"  {moment}")
    verdict = "fits" if found["fits"] else "does not fit"
    need, room = found["device_bytes"] / GIB, found["room_bytes"] / GIB
    lines.append(f"        {verdict}: {need:.2f} GiB with allocator and process, of {room:.2f} GiB that may be filled")
    return lines
