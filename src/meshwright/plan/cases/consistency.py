"""What a measured or imagined run must agree with itself in: degrees that multiply, divide and share what there is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from meshwright.errors import Problem

#: Interleaved schedules are replayed action by action; no run comes near this.
MOST_VIRTUAL_STAGES = 512

Contradiction = Callable[["CaseFacts"], "Problem | None"]


@dataclass(frozen=True)
class CaseFacts:
    """What the rules look at: the checked tables of a case, its layout filled in."""

    model: Mapping[str, Any]
    cluster: Mapping[str, Any]
    train: Mapping[str, Any]
    layout: Mapping[str, Any]

    def __getitem__(self, key: str) -> int:
        """A degree of the layout."""
        return int(self.layout.get(key, 1))


def contradictions(facts: CaseFacts) -> list[Problem]:
    """Every rule that the case breaks, each with the nearest value that keeps it."""
    return [problem for rule in RULES if (problem := rule(facts)) is not None]


def _multiplies(facts: CaseFacts) -> Problem | None:
    devices, rest = int(facts.cluster["devices"]), facts["tp"] * facts["pp"] * facts["cp"]
    if facts["dp"] * rest == devices:
        return None
    near = f"nearest: dp={devices // rest}" if devices % rest == 0 else f"nearest: devices={facts['dp'] * rest}"
    degrees = " x ".join(f"{key}={facts[key]}" for key in ("dp", "tp", "pp", "cp"))
    return Problem("layout", f"{degrees} is {facts['dp'] * rest}, the cluster has {devices} devices", near)


def _divides(
    where: str, part: Callable[[CaseFacts], int], whole: Callable[[CaseFacts], int], what: str
) -> Contradiction:
    """A rule that one figure divides another."""

    def rule(facts: CaseFacts) -> Problem | None:
        small, large = part(facts), whole(facts)
        if large % small == 0:
            return None
        return Problem(where, f"{small} does not divide {what}, {large}", f"nearest: {_divisor(large, small)}")

    return rule


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`; of huge numbers, one that is quickly found."""
    near = range(most, max(0, most - 10_000), -1)
    return next((d for d in near if number % d == 0), gcd(number, most))


def _shares_heads(facts: CaseFacts) -> Problem | None:
    tp, kv = facts["tp"], int(facts.model.get("kv_heads", facts.model["heads"]))
    if kv % tp == 0 or tp % kv == 0:
        return None
    what = f"{tp} neither divides the {kv} key and value heads nor is a multiple of them"
    return Problem("layout.tp", what, f"nearest: {_divisor(kv, tp)}")


def _stages(facts: CaseFacts) -> Problem | None:
    stages, blocks = facts["pp"] * facts["vpp"], int(facts.model["layers"]) + 2
    if facts["vpp"] > 1 and facts["pp"] == 1:
        return Problem("layout.vpp", "virtual stages need a pipeline", "nearest: vpp=1")
    if facts["vpp"] > 1 and stages > MOST_VIRTUAL_STAGES:
        what = f"pp x vpp is {stages} virtual stages, more than are replayed"
        return Problem("layout.vpp", what, f"nearest: vpp={max(1, MOST_VIRTUAL_STAGES // facts['pp'])}")
    if stages <= blocks:
        return None
    what = f"pp x vpp is {stages} stages, the model has {blocks} blocks (embedding and head counted)"
    return Problem("layout.pp", what, f"nearest: pp={min(facts['pp'], blocks)} with vpp=1")


def _visits_experts(facts: CaseFacts) -> Problem | None:
    experts, visits = int(facts.model.get("experts", 0)), int(facts.model.get("top_k", 0))
    if facts["ep"] > 1 and not experts:
        return Problem("layout.ep", f"{facts['ep']}-way expert parallelism of a model without experts", "nearest: ep=1")
    if experts and not 1 <= visits <= experts:
        near = min(max(visits, 1), experts)
        return Problem("model.top_k", f"a token visits {visits} of {experts} experts", f"nearest: top_k={near}")
    return None


def _shares_batch(facts: CaseFacts) -> Problem | None:
    batch, each, dp = int(facts.train["global_batch"]), facts["micro_batch"], facts["dp"]
    if batch % (each * dp) == 0:
        return None
    what = f"dp={dp} ranks with micro-batches of {each} do not divide a batch of {batch}"
    if batch % dp == 0:
        return Problem("layout.micro_batch", what, f"nearest: micro_batch={_divisor(batch // dp, each)}")
    return Problem("train.global_batch", what, f"nearest: global_batch={-(-batch // (each * dp)) * each * dp}")


def _spread(facts: CaseFacts) -> int:
    return facts["dp"] * facts["cp"]


RULES: tuple[Contradiction, ...] = (
    _multiplies,
    _divides(
        "cluster.devices_per_node",
        lambda facts: int(facts.cluster.get("devices_per_node", 1)),
        lambda facts: int(facts.cluster["devices"]),
        "the number of devices",
    ),
    _divides("layout.shard", lambda facts: facts["shard"], _spread, "dp x cp"),
    _divides("layout.optimizer_shard", lambda facts: facts["optimizer_shard"], _spread, "dp x cp"),
    _divides("layout.ep", lambda facts: facts["ep"], _spread, "dp x cp"),
    _divides(
        "layout.ep",
        lambda facts: facts["ep"],
        lambda facts: int(facts.model.get("experts") or facts["ep"]),
        "the experts",
    ),
    _divides("layout.tp", lambda facts: facts["tp"], lambda facts: int(facts.model["heads"]), "the attention heads"),
    _divides("layout.tp", lambda facts: facts["tp"], lambda facts: int(facts.model["ffn"]), "the feed-forward width"),
    _shares_heads,
    _divides(
        "model.heads",
        lambda facts: int(facts.model["heads"]),
        lambda facts: int(facts.model["heads"] if "head_dim" in facts.model else facts.model["hidden"]),
        "the hidden width",
    ),
    _divides(
        "model.kv_heads",
        lambda facts: int(facts.model.get("kv_heads", 1)),
        lambda facts: int(facts.model["heads"]),
        "the attention heads",
    ),
    _divides("layout.cp", lambda facts: facts["cp"], lambda facts: int(facts.model["seq_len"]), "the sequence"),
    _visits_experts,
    _shares_batch,
    _stages,
)
