"""Whether the figures of a case agree: degrees whose product is the devices, divisors, shares of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from meshwright.errors import Problem

#: Interleaved schedules are replayed action by action; real runs have far fewer.
MOST_VIRTUAL_STAGES = 512

_Rule = Callable[["CaseTables"], "Problem | None"]


@dataclass(frozen=True)
class CaseTables:
    """The checked tables of a case, with the defaults of its layout."""

    model: Mapping[str, Any]
    cluster: Mapping[str, Any]
    train: Mapping[str, Any]
    layout: Mapping[str, Any]

    def __getitem__(self, key: str) -> int:
        """A degree of the layout."""
        return int(self.layout.get(key, 1))


def contradictions(tables: CaseTables) -> list[Problem]:
    """A problem for every rule that the case breaks, with the nearest value that satisfies the rule."""
    return [problem for rule in RULES if (problem := rule(tables)) is not None]


def _device_count(tables: CaseTables) -> Problem | None:
    devices, rest = int(tables.cluster["devices"]), tables["tp"] * tables["pp"] * tables["cp"]
    if tables["dp"] * rest == devices:
        return None
    near = f"nearest: dp={devices // rest}" if devices % rest == 0 else f"nearest: devices={tables['dp'] * rest}"
    degrees = " x ".join(f"{key}={tables[key]}" for key in ("dp", "tp", "pp", "cp"))
    return Problem("layout", f"{degrees} is {tables['dp'] * rest}, the cluster has {devices} devices", near)


def _divides(where: str, whole: Callable[[CaseTables], int], what: str) -> _Rule:
    """A rule that the figure at `where`, "table.key", divides `whole`; a figure that is not given is 1."""
    table, key = where.split(".")

    def rule(tables: CaseTables) -> Problem | None:
        small, large = int(getattr(tables, table).get(key, 1)), whole(tables)
        if large % small == 0:
            return None
        return Problem(where, f"{small} does not divide {what}, {large}", f"nearest: {_divisor(large, small)}")

    return rule


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`; for huge numbers, one that is found quickly."""
    near = range(most, max(0, most - 10_000), -1)
    return next((d for d in near if number % d == 0), gcd(number, most))


def _kv_heads(tables: CaseTables) -> Problem | None:
    tp, kv = tables["tp"], int(tables.model.get("kv_heads", tables.model["heads"]))
    if kv % tp == 0 or tp % kv == 0:
        return None
    what = f"{tp} neither divides the {kv} key and value heads nor is a multiple of them"
    return Problem("layout.tp", what, f"nearest: {_divisor(kv, tp)}")


def _stage_count(tables: CaseTables) -> Problem | None:
    stages, blocks = tables["pp"] * tables["vpp"], int(tables.model["layers"]) + 2
    if tables["vpp"] > 1 and tables["pp"] == 1:
        return Problem("layout.vpp", "virtual stages need a pipeline", "nearest: vpp=1")
    if tables["vpp"] > 1 and stages > MOST_VIRTUAL_STAGES:
        what = f"pp x vpp is {stages} virtual stages, more than can be replayed"
        return Problem("layout.vpp", what, f"nearest: vpp={max(1, MOST_VIRTUAL_STAGES // tables['pp'])}")
    if stages <= blocks:
        return None
    what = f"pp x vpp is {stages} stages, the model has {blocks} blocks (embedding and head counted)"
    return Problem("layout.pp", what, f"nearest: pp={min(tables['pp'], blocks)} with vpp=1")


def _experts(tables: CaseTables) -> Problem | None:
    experts, top_k = int(tables.model.get("experts", 0)), int(tables.model.get("top_k", 0))
    if tables["ep"] > 1 and not experts:
        return Problem("layout.ep", f"is {tables['ep']}, and the model has no experts", "nearest: ep=1")
    if experts and not 1 <= top_k <= experts:
        near = min(max(top_k, 1), experts)
        return Problem("model.top_k", f"a token visits {top_k} of {experts} experts", f"nearest: top_k={near}")
    return None


def _batch(tables: CaseTables) -> Problem | None:
    batch, each, dp = int(tables.train["global_batch"]), tables["micro_batch"], tables["dp"]
    if batch % (each * dp) == 0:
        return None
    what = f"dp={dp} ranks with micro-batches of {each} do not divide a batch of {batch}"
    if batch % dp == 0:
        return Problem("layout.micro_batch", what, f"nearest: micro_batch={_divisor(batch // dp, each)}")
    return Problem("train.global_batch", what, f"nearest: global_batch={-(-batch // (each * dp)) * each * dp}")


def _data_ranks(tables: CaseTables) -> int:
    return tables["dp"] * tables["cp"]


RULES: tuple[_Rule, ...] = (
    _device_count,
    _divides("cluster.devices_per_node", lambda tables: int(tables.cluster["devices"]), "the number of devices"),
    _divides("layout.shard", _data_ranks, "dp x cp"),
    _divides("layout.optimizer_shard", _data_ranks, "dp x cp"),
    _divides("layout.ep", _data_ranks, "dp x cp"),
    _divides("layout.ep", lambda tables: int(tables.model.get("experts") or tables["ep"]), "the experts"),
    _divides("layout.tp", lambda tables: int(tables.model["heads"]), "the attention heads"),
    _divides("layout.tp", lambda tables: int(tables.model["ffn"]), "the feed-forward width"),
    _kv_heads,
    _divides(
        "model.heads",
        lambda tables: int(tables.model["heads"] if "head_dim" in tables.model else tables.model["hidden"]),
        "the hidden width",
    ),
    _divides("model.kv_heads", lambda tables: int(tables.model["heads"]), "the attention heads"),
    _divides("layout.cp", lambda tables: int(tables.model["seq_len"]), "the sequence"),
    _experts,
    _batch,
    _stage_count,
)
