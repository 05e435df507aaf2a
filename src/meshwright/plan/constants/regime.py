"""Which runs a profile's intervals and corrections speak of, and what it says of a layout: factors of predicted time."""

from __future__ import annotations

import math

from meshwright.layout import Layout
from meshwright.plan.constants.correction import SCALES
from meshwright.plan.constants.profile import Profile
from meshwright.plan.workload import Workload


def interval_regime(workload: Workload) -> tuple[str, str, str]:
    """Words, from the most general on, of what decides how far a prediction may be off."""
    extent = "nodes" if workload.cluster.nodes > 1 else "node"
    return workload.cluster.device.kind, workload.framework.name, extent


def correction_regime(workload: Workload, layout: Layout) -> str:
    """What a correction is learnt for: runs that differ in size and split alone."""
    kind, framework, extent = interval_regime(workload)
    where = workload.cluster.device.name if kind == "cuda" else kind
    return "/".join((where, framework, workload.precision, layout.recompute, extent))


def features(workload: Workload, layout: Layout) -> tuple[float, ...]:
    """Where a run lies among others of its regime: the features of `correction.SCALES`."""
    card, seq_len = workload.card, workload.card.units_per_sample
    figures = {
        "tp": layout.tp,
        "micro_batch": layout.micro_batch,
        "hidden": card.blocks[0].output_elements / seq_len,
        "seq_len": seq_len / layout.cp,
        "pp": layout.pp,
        "data_ranks": layout.dp * layout.cp,
        "micro_batches": layout.micro_batches(workload.global_batch),
        "layers": len(card.blocks),
    }
    return tuple(math.log2(figures[name]) for name in SCALES)


def correction_factor(profile: Profile, workload: Workload, layout: Layout) -> float:
    """What the profile's correction multiplies a predicted time by; 1 where it has learnt nothing of such runs."""
    known = profile.corrections.get(correction_regime(workload, layout))
    return 1.0 if known is None else known.factor(features(workload, layout))


def time_interval(profile: Profile, workload: Workload, layout: Layout, width: float = 1.0) -> tuple[float, float]:
    """Factors of a predicted time that bound its 90 % interval: wider where a correction reaches far, and to the power
    `width`."""
    low, high = profile.interval(*interval_regime(workload))
    known = profile.corrections.get(correction_regime(workload, layout))
    spread = 1.0 if known is None else known.spread(features(workload, layout)) / known.noise
    return low ** (width * spread), high ** (width * spread)
