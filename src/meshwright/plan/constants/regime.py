"""The regimes of a profile's intervals and corrections, and their factors on the predicted time of a layout."""

from __future__ import annotations

import math

from meshwright.layout import Layout
from meshwright.plan.constants.correction import SCALES
from meshwright.plan.constants.profile import Profile
from meshwright.plan.workload import Workload


def interval_regime(workload: Workload) -> tuple[str, str, str]:
    """Words, the most general first, for what decides how far a prediction may be off."""
    extent = "nodes" if workload.cluster.nodes > 1 else "node"
    return workload.cluster.device.kind, workload.framework.name, extent


def correction_regime(workload: Workload, layout: Layout) -> str:
    """Runs of one regime, for which one correction is learnt, differ in size and split alone."""
    kind, framework, extent = interval_regime(workload)
    where = workload.cluster.device.name if kind == "cuda" else kind
    return "/".join((where, framework, workload.precision, layout.recompute, extent))


def features(workload: Workload, layout: Layout) -> tuple[float, ...]:
    """The values of `correction.SCALES`' features for a run."""
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
    """The profile's correction of a predicted time; 1 where the regime has none."""
    correction = profile.corrections.get(correction_regime(workload, layout))
    return 1.0 if correction is None else correction.factor(features(workload, layout))


def time_interval(profile: Profile, workload: Workload, layout: Layout, width: float = 1.0) -> tuple[float, float]:
    """Factors of a predicted time that bound its 90 % interval, to the power `width`; they are narrower near the runs
    that a correction was learnt from."""
    low, high = profile.interval(*interval_regime(workload))
    correction = profile.corrections.get(correction_regime(workload, layout))
    width *= 1.0 if correction is None else correction.width(features(workload, layout))
    return low**width, high**width
