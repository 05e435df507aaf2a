"""What a plan says beyond its layout, in lines of text for screen and page: failures, money, what would help."""

from __future__ import annotations

from meshwright.plan import Plan
from meshwright.plan.advice import Advice

WHAT_IFS_SHOWN = 3
#: Failures are not spoken of where fewer than this are expected, or, in a run without an end, cost less than this.
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
    """Money and elapsed time of the whole run."""
    outlook = plan.outlook
    if outlook is None:
        return "no price known; failures not modelled"
    words = []
    if outlook.elapsed_seconds is not None:
        words.append(f"the run takes {duration(outlook.elapsed_seconds)}")
    kind = "on spot" if outlook.spot else "on demand"
    dollars = "" if outlook.dollars is None else f"${outlook.dollars:,.2f}"
    if bounds := plan.chosen.predicted.intervals.get("dollars"):
        dollars += f" (90 %: {bounds[0]:,.0f} to {bounds[1]:,.0f})"
    if outlook.dollars is not None and outlook.price is None:  # devices of several kinds
        words.append(f"{dollars} {kind}, each kind of device at its own price")
    elif outlook.dollars is not None and outlook.price is not None:
        age = "as the job says" if outlook.price.as_of == "job" else f"price of {outlook.price.as_of}"
        words.append(f"{dollars} {kind} at ${outlook.price.dollars_per_hour:,.2f} a device-hour ({age})")
    elif not outlook.never_ends:
        words.append("no price known")
    return ", ".join(words) or "a run that does not end"


def failure_line(plan: Plan) -> str:
    """What failures do to the run: "" where that is next to nothing."""
    outlook = plan.outlook
    if outlook is None:
        return ""
    hours = outlook.mtbf_hours
    often = f"one every {hours / 24:,.0f} days" if hours >= 48 else f"one every {hours:,.1f} h"
    often = often if hours >= 1 else f"one every {duration(hours * 3600)}"
    if outlook.never_ends:
        return f"{often}: faster than {outlook.checkpoint_steps:,} steps can be saved, so the run would not end"
    rare = outlook.goodput > 1 - SMALL_LOSS if outlook.failures is None else outlook.failures < RARE
    if rare:
        return ""
    spare = f", keep {outlook.spare_nodes} spare node{'s' * (outlook.spare_nodes > 1)}" if outlook.spare_nodes else ""
    return (
        f"{often}: save every {outlook.checkpoint_steps:,} steps ({duration(outlook.checkpoint_seconds)}){spare}; "
        f"goodput {outlook.goodput:.1%}"
    )


def what_if_lines(plan: Plan) -> list[str]:
    """What each change would save, the most first."""
    ordered = sorted(plan.buys, key=lambda one: -one.saves)
    what = "time" if plan.objective == "time" else "cost"
    return [f"{one.change}: {one.saves:.0%} less {what} per sample ({one.layout})" for one in ordered[:WHAT_IFS_SHOWN]]


def share_lines(plan: Plan) -> list[str]:
    """What each kind of device does, in a cluster of several."""
    lines = []
    for share in plan.shares:
        what = f"{share.stages}, {share.samples} samples of each batch in micro-batches of {share.micro_batch}"
        lines.append(f"{share.devices} x {share.group}: " + (f"{what}; " if share.samples else "") + share.why)
    return lines


def plan_lines(plan: Plan) -> list[tuple[str, str]]:
    """All of the above for a page: (heading, line), in the order that they are asked for."""
    lines = [("Held back by", plan.limit), ("Cost", cost_line(plan)), ("Failures", failure_line(plan))]
    lines += [("Share", line) for line in share_lines(plan)]
    lines += [("What if", line) for line in what_if_lines(plan)]
    return [(heading, line) for heading, line in lines if line]


def advice_lines(advice: Advice) -> list[str]:
    """Strategies with their reasons, then the tools: the one to use, those that would do as well, those that do not."""
    lines = [f"{reason.strategy}: {reason.why}" for reason in advice.strategies]
    for place, verdict in enumerate(advice.tools):
        word = ("or" if place else "use") if verdict.suits else "not"
        lines.append(f"{word} {verdict.tool}: {verdict.why}")
    return lines
