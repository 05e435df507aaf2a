"""Speed of the search: candidates estimated a second on one core, and how long plans of large clusters take.

    python bench/speed/search.py [--candidates 100000] [--profile] [--json]

Seconds are processor time of this process (process_time). The first table searches whole spaces: every candidate is
estimated, or left out because a proven bound says that it cannot be the best. The second estimates each of the first
--candidates layouts. The third makes whole plans with the usual limits of the space, with runners-up, what-ifs, and the
forecast of the run.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

from meshwright.card import Card
from meshwright.cluster import Cluster, named_cluster
from meshwright.families import card_of_job
from meshwright.families.llama.card import LlamaShape
from meshwright.job import Job
from meshwright.plan import FRAMEWORKS, PlanRequest, Workload, make_plan
from meshwright.plan.cases.resolve import card_style
from meshwright.plan.cost import Estimator
from meshwright.plan.search import Space
from meshwright.plan.search.space import layouts
from meshwright.plan.search.walk import explore

LLAMA_8B = LlamaShape(32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B = LlamaShape(80, 8192, 64, 8, 128, 28672, 128256)
LLAMA_405B = LlamaShape(126, 16384, 128, 8, 128, 53248, 128256)

#: (model, shape, devices, global batch, framework) of the first two tables.
ESTIMATED = (
    ("8B", LLAMA_8B, 512, 1024, "megatron-lm"),
    ("70B", LLAMA_70B, 2048, 2048, "meshwright"),
    ("70B", LLAMA_70B, 1024, 2048, "megatron-lm"),
    ("405B", LLAMA_405B, 1024, 1024, "megatron-lm"),
)
#: The same of the third table.
PLANNED = (
    ("8B", LLAMA_8B, 8, 64, "meshwright"),
    ("70B", LLAMA_70B, 512, 1024, "meshwright"),
    ("70B", LLAMA_70B, 512, 1024, "megatron-lm"),
    ("405B", LLAMA_405B, 16_384, 2048, "meshwright"),
    ("405B", LLAMA_405B, 16_384, 2048, "megatron-lm"),
    ("405B", LLAMA_405B, 100_000, 4000, "meshwright"),
    ("405B", LLAMA_405B, 100_000, 4000, "megatron-lm"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--profile", action="store_true", help="print a profile of the last row of the last two tables")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    searched = [_searched(*row) for row in ESTIMATED]
    rows = [_estimated(*row, options.candidates) for row in ESTIMATED]
    plans = [_planned(*row) for row in PLANNED]
    if options.json:
        print(json.dumps({"searched": searched, "estimated": rows, "planned": plans}))
        return
    print("model  devices  framework      candidates  estimated  seconds  seconds for 100,000")
    for row in searched:
        about = "{model:<6} {devices:>7,}  {framework:<12} {candidates:>12,}"
        print((about + "  {estimated:>9,}  {seconds:>7.2f}  {each:>7.1f}").format(**row))
    print("\nmodel  devices  framework      candidates  seconds  us each")
    for row in rows:
        line = "{model:<6} {devices:>7,}  {framework:<12} {candidates:>12,}  {seconds:>7.2f}  {microseconds:>7.1f}"
        print(line.format(**row))
    print("\nmodel  devices  framework       in bounds  estimated  seconds  layout")
    for row in plans:
        line = "{model:<6} {devices:>7,}  {framework:<12} {space:>12,}  {estimated:>9,}  {seconds:>7.2f}  {layout}"
        print(line.format(**row))
    if options.profile:
        _profiled(lambda: _estimated(*ESTIMATED[-1], min(options.candidates, 5_000)))
        _profiled(lambda: _planned(*PLANNED[-1]))


def _model_and_cluster(shape: LlamaShape, devices: int, framework: str) -> tuple[Card, Cluster]:
    model = {"layers": shape.layers, "hidden": shape.hidden, "heads": shape.heads, "kv_heads": shape.kv_heads}
    job = Job(
        model={"family": "llama", **model, "ffn": shape.ffn, "vocab": shape.vocab},
        data={"seq_len": 8192},
        train={"steps": 1, "lr": 1e-4, "global_batch": 1},
    )
    style = "plain" if framework == "meshwright" else card_style(framework, "bf16", None)
    return card_of_job(job, style), named_cluster("h100-sxm-80gb", devices)


def _searched(name: str, shape: LlamaShape, devices: int, batch: int, framework: str) -> dict[str, Any]:
    """Searches the whole space without losing the best layout."""
    model, cluster = _model_and_cluster(shape, devices, framework)
    space = Space(Workload(model, cluster, batch, "bf16", FRAMEWORKS[framework]), {})
    estimator = Estimator(space.workload)
    begin = time.process_time()
    counts = explore(space, estimator).counts
    seconds = time.process_time() - begin
    about = {"model": name, "devices": devices, "framework": framework, "candidates": counts["space"]}
    return {
        **about,
        "estimated": counts["estimated"],
        "seconds": seconds,
        "each": seconds / counts["space"] * 100_000,
    }


def _estimated(name: str, shape: LlamaShape, devices: int, batch: int, framework: str, most: int) -> dict[str, Any]:
    """Estimates the first `most` layouts of the whole space with a new estimator."""
    model, cluster = _model_and_cluster(shape, devices, framework)
    space = Space(Workload(model, cluster, batch, "bf16", FRAMEWORKS[framework]), {})
    estimator = Estimator(space.workload)
    begin, count = time.process_time(), 0
    for layout in islice(layouts(space), most):
        estimator.estimate(layout)
        count += 1
    seconds = time.process_time() - begin
    about = {"model": name, "devices": devices, "framework": framework}
    return {**about, "candidates": count, "seconds": seconds, "microseconds": 1e6 * seconds / count}


def _planned(name: str, shape: LlamaShape, devices: int, batch: int, framework: str) -> dict[str, Any]:
    model, cluster = _model_and_cluster(shape, devices, framework)
    begin = time.process_time()
    plan = make_plan(model, cluster, PlanRequest(batch, steps=10_000, framework=framework))
    seconds = time.process_time() - begin
    about = {"model": name, "devices": devices, "framework": framework, "layout": str(plan.chosen.layout)}
    return {**about, "seconds": seconds, **{key: plan.considered[key] for key in ("space", "estimated")}}


def _profiled(call: Callable[[], object]) -> None:
    profile = cProfile.Profile()
    profile.runcall(call)
    pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
