"""Lines of text about a plan, for the screen and the page: cost, failures, what-ifs, shares, rehearsal and advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.cluster import GIB
from meshwright.plan import Plan
from meshwright.plan.advice import Advice

MIB = 1024**2
WHAT_IFS_SHOWN = 3
#: Failures are left out where fewer are expected or, in a run without a last step, where they cost less.
RARE, SMALL_LOSS = 0.01, 0.005


def duration(seconds: float) -> str:
    """A length of time in two units at most: 1 h 05 min, 54 d 3 h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def cost_line(plan: Plan) -> str:
    """Elapsed time and price of the whole run."""
    outlook = plan.outlook
    if outlook is None:
        return "no price known, failures not modelled"
    words = []
    if outlook.elapsed_seconds is not None:
        words.append(f"the run takes {duration(outlook.elapsed_seconds)}")
    kind = "on spot" if outlook.spot else "on demand"
    dollars = "" if outlook.dollars is None else f"${outlook.dollars:,.2f}"
    if bounds := plan.chosen.predicted.intervals.get("dollars"):
        dollars += f" (90 %: {bounds[0]:,.2f} to {bounds[1]:,.2f})"
    if outlook.dollars is not None and outlook.price is None:  # devices of several kinds
        words.append(f"{dollars} {kind}, each kind of device at its own price")
    elif outlook.dollars is not None and outlook.price is not None:
        source = "the job's price" if outlook.price.as_of == "job" else f"price of {outlook.price.as_of}"
        words.append(f"{dollars} {kind} at ${outlook.price.dollars_per_hour:,.2f} per device-hour ({source})")
    elif not outlook.never_ends:
        words.append("no price known")
    return ", ".join(words) or "the run would not end"


def failure_line(plan: Plan) -> str:
    """How often failures come, how often to save, and the goodput; "" where failures hardly matter."""
    outlook = plan.outlook
    if outlook is None:
        return ""
    hours = outlook.mtbf_hours
    often = f"one every {hours / 24:,.0f} days" if hours >= 48 else f"one every {hours:,.1f} h"
    often = often if hours >= 1 else f"one every {duration(hours * 3600)}"
    if outlook.never_ends:
        return f"{often}: too often to save {outlook.checkpoint_steps:,} steps, so the run would not end"
    rare = outlook.goodput > 1 - SMALL_LOSS if outlook.failures is None else outlook.failures < RARE
    if rare:
        return ""
    spare = f", keep {outlook.spare_nodes} spare node{'s' * (outlook.spare_nodes > 1)}" if outlook.spare_nodes else ""
    return (
        f"{often}: save every {outlook.checkpoint_steps:,} steps ({duration(outlook.checkpoint_seconds)}){spare}; "
        f"goodput {outlook.goodput:.1%}"
    )


def what_if_lines(plan: Plan) -> list[str]:
    """What each change would save, the largest saving first."""
    ordered = sorted(plan.buys, key=lambda one: -one.saves)
    what = "time" if plan.objective == "time" else "cost"
    return [f"{one.change}: {one.saves:.0%} less {what} per sample ({one.layout})" for one in ordered[:WHAT_IFS_SHOWN]]


def share_lines(plan: Plan) -> list[str]:
    """The part of each kind of device, in a cluster of several kinds."""
    lines = []
    for share in plan.shares:
        what = f"{share.stages}, {share.samples} samples of each batch in micro-batches of {share.micro_batch}"
        lines.append(f"{share.devices} x {share.group}: " + (f"{what}; " if share.samples else "") + share.why)
    return lines


def plan_lines(plan: Plan) -> list[tuple[str, str]]:
    """(heading, line) of all of the above, for a page."""
    lines = [("Limit", plan.limit), ("Cost", cost_line(plan)), ("Failure", failure_line(plan))]
    lines += [("Share", line) for line in share_lines(plan)]
    lines += [("What if", line) for line in what_if_lines(plan)]
    return [(heading, line) for heading, line in lines if line]


def advice_lines(advice: Advice) -> list[str]:
    """A line per strategy with its reason, then a line per tool: the one to use, the alternatives, the unsuitable."""
    lines = [f"{reason.strategy}: {reason.why}" for reason in advice.strategies]
    for place, verdict in enumerate(advice.tools):
        word = ("or" if place else "use") if verdict.suits else "not"
        lines.append(f"{word} {verdict.tool}: {verdict.why}")
    return lines


def exact_lines(exact: Mapping[str, Any]) -> list[str]:
    """The JSON under chosen.exact: a row per rehearsed rank with its bytes at the peak by category, and the verdict."""
    lines = ["exact   rehearsed on fake tensors: the most that a rank's tensors hold, in MiB"]
    names = list(exact["ranks"][0]["parts"])
    head = f"{'rank':>7} {'stage':>5} {'formula':>10} {'rehearsed':>10}"
    lines.append(head + "".join(f" {name:>11}" for name in names) + "  at the peak")
    for rank in exact["ranks"]:
        figures = f"{rank['formula_bytes'] / MIB:>10,.1f} {rank['peak_bytes'] / MIB:>10,.1f}"
        parts = "".join(f" {size / MIB:>11,.1f}" for size in rank["parts"].values())
        moment = f"{rank['phase']} of {rank['block']}" if rank["block"] else rank["phase"]
        lines.append(f"{rank['rank']:>7} {rank['stage']:>5} {figures}{parts}  {moment}")
    verdict = "fits" if exact["fits"] else "does not fit"
    need, room = exact["device_bytes"] / GIB, exact["room_bytes"] / GIB
    lines.append(f"        {verdict}: {need:.2f} GiB with allocator and process, of {room:.2f} GiB usable")
    return lines


def status_lines(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The result of `verbs.status`: a line for each run, then its nodes with their ranks, and its last failures."""
    if not runs:
        return ["no runs here"]
    lines = []
    width = max(len(run["run"]) for run in runs)
    for run in runs:
        step = "-" if run["step"] is None else f"{run['step']}/{run['steps'] or '?'}"
        figures = [f"step {step}"]
        if run["loss"] is not None:
            figures.append(f"loss {run['loss']:.4f}")
        if run["tokens_per_second"] is not None:
            figures.append(f"{run['tokens_per_second']:,.0f} tokens/s")
        if run["ranks"]:
            figures.append(f"{len(run['ranks'])} ranks on {len(run['nodes'])} nodes, generation {run['generation']}")
        lines.append(f"{run['run']:<{width}}  {run['state']:<11}  {'  '.join(figures)}")
        for node in run["nodes"]:
            here = [one for one in run["ranks"] if one["node"] == node["name"]]
            ranks = ", ".join(f"{one['role']} {one['rank']} {one['state']}" for one in here) or "no ranks"
            lines.append(f"  {node['name']} ({node['address']}, {node['devices']} {node['kind']} devices): {ranks}")
        lines += [f"  failed: {reason.splitlines()[0]}" for reason in run["failures"][-3:]]
    return lines
